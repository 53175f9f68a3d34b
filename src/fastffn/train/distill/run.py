"""`fastffn distill`: first each FFN learns from its dense one, then the whole student from the teacher."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from fastffn.convert.files import read_json, write_json
from fastffn.convert.match import fastffn_modules
from fastffn.errors import ConfigError, OutputError
from fastffn.measure.machine import describe_machine
from fastffn.train import processes, rundir
from fastffn.train.arguments import run_arguments, split_batch
from fastffn.train.disk import full_disk_is_named
from fastffn.train.distill import report
from fastffn.train.distill.config import DistillConfig
from fastffn.train.distill.models import Pair, choose_trainable, find_pair
from fastffn.train.distill.objectives import FFNRegression, Objective, end_to_end
from fastffn.train.distill.text import DistillText, read_distill_text
from fastffn.train.distill.trainer import DistillTrainer, TimeLimit, held_out
from fastffn.train.plan import Stage
from fastffn.train.processes import say
from fastffn.train.progress import where_it_stands
from fastffn.train.text import check_outside, weights_identity
from fastffn.train.trainer import Clock
from fastffn.train.watch import Forecast, Watch

LAYERS, STUDENT = "layers", "student"


def distill(
    config: DistillConfig, output: Path, *, overwrite: bool = False, max_minutes: float | None = None
) -> dict[str, Any]:
    """Recovers the quality of a converted model: its dense original teaches it.

    Args:
        config: the run; see `DistillConfig`.
        output: the run directory. If it holds the same run, unfinished, it goes on from the last checkpoint.
        overwrite: delete another run in `output` first.
        max_minutes: stop after so many, with a checkpoint from which the same call goes on; None: no limit.

    Returns:
        What is in `results.json`: held-out measures before and after, phases, machine and versions; `complete` is
        False, and there is no such file, where the time ended first. The model is in `output / results["model"]`.

    Raises:
        CheckpointError: student and teacher are missing, or do not belong together.
        OutputError: `output` holds another run, or another process trains in it.
        DataError: no text, or too little.
        TrainingDivergedError: the loss is no longer a number.
        WriteError: the disk is full.
    """
    begun = time.monotonic()
    if max_minutes is not None and not max_minutes > 0:
        raise ConfigError(f"max_minutes is {max_minutes}; it must be above 0.")
    output = Path(output)
    processes.join()
    if processes.count() > 1:
        raise ConfigError(
            f"fastffn distill runs in one process and was started in {processes.count()}; start it without a launcher."
        )
    check_outside(output, {"student": config.student, "teacher": config.teacher})
    pair = find_pair(Path(config.student), Path(config.teacher))
    if config.text_weight and pair.task == "states":
        raise ConfigError(f"text_weight is {config.text_weight}; {pair.architecture.__name__} predicts no tokens.")
    with rundir.locked(output), full_disk_is_named(output):
        resumed = rundir.check_run(output, config, overwrite=overwrite)
        if resumed and (output / "results.json").is_file():
            done = read_json(output / "results.json")
            print(f"{output} holds this run already, complete; no text was read.")
            report.print_report(done, output)
            return done
        if resumed:
            say(f"{output} holds this run already; going on from what is complete.")
        # Text first: what is wrong with it should neither delete another run nor leave a half one behind.
        text = read_distill_text(config, pair)
        identity = " ".join([text.identity, *weights_identity(pair.student), *weights_identity(pair.teacher)])
        if resumed and not rundir.same_text(output, identity):
            if not overwrite:
                raise OutputError(
                    f"The text, the student or the teacher has changed since the run in {output} "
                    "was begun. Restore it, name another directory, or pass --overwrite to start anew."
                )
            resumed = False
        if resumed:
            rundir.clear_partials(output)
        else:
            rundir.claim_run(output, config)
        rundir.keep_text(output, identity)
        deadline = None if max_minutes is None else begun + 60 * max_minutes
        return _Run(config, output, pair, text, deadline).results()


class _Run:
    """One run; a method for each thing that happens to it."""

    def __init__(
        self, config: DistillConfig, output: Path, pair: Pair, text: DistillText, deadline: float | None
    ) -> None:
        self.config = config
        self.output = output
        self.pair = pair
        self.text = text
        self.deadline = deadline
        self.stages = _stages(config)
        self.records: dict[str, Any] = {}
        arguments = self._arguments(output, next(iter(self.stages.values())))
        self.device: torch.device = arguments.device
        self.autocast = torch.bfloat16 if arguments.bf16 else None
        self.micro_batch: int = arguments.per_device_train_batch_size
        self.teacher = pair.load_teacher().to(self.device)
        student = pair.load_student()
        self.paths = [path for path, _ in fastffn_modules(student)]
        self.objectives: dict[str, Objective] = {
            LAYERS: FFNRegression(self.teacher, text.masking, self.paths),
            STUDENT: end_to_end(
                pair.task,
                self.teacher,
                text.masking,
                temperature=config.temperature,
                text_weight=config.text_weight,
            ),
        }
        self.before = self._before(student)

    def results(self) -> dict[str, Any]:
        """Runs whatever is not done yet, and writes the report."""
        directory = self.pair.student
        seconds = 0.0
        for name, stage in self.stages.items():
            record = self._train(stage, directory, seconds)
            if record is None:
                return self._stopped(stage)
            self.records[name] = record
            seconds, directory = record["seconds"], self.output / name
        results = self._facts() | {"complete": True, "model": directory.name, "machine": describe_machine()}
        report.write_report(self.output, results)
        report.print_report(results, self.output)
        return results

    def _stopped(self, stage: Stage) -> dict[str, Any]:
        facts = self._facts() | {"complete": False}
        state = f"{stage.name}: the time given ended; the same command goes on from the last checkpoint."
        report.write_progress(self.output, facts, state)
        say(state)
        return facts

    def _facts(self) -> dict[str, Any]:
        """What a report says, the phases that are done among it."""
        return {
            "config": self.config.to_flat(),
            "task": self.pair.task,
            "text": self.text.facts(),
            "before": self.before,
            "stages": dict(self.records),
        }

    # -- measuring -------------------------------------------------------------------------------------------------

    def _before(self, student: Any) -> dict[str, Any]:
        kept = self.output / "before.json"
        if not kept.is_file():
            say("Measuring the converted model on held-out text ...")
            write_json(kept, self._measure(student))
        return read_json(kept)

    def _measure(self, student: Any) -> dict[str, Any]:
        """Held-out measures of both phases: `ffn_errors`, their mean `ffn_error`, and those of the whole model."""
        student.to(self.device)
        autocast = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        found = {}
        for name, objective in self.objectives.items():
            batches = DataLoader(self.text.validation, batch_size=self.micro_batch, collate_fn=self.text.collate)
            with autocast:
                found[name] = objective.metrics(held_out(objective, student, batches, self.device))
        errors = found[LAYERS]
        ffns = {"ffn_error": errors.pop("loss"), "ffn_errors": errors}
        return report.with_perplexity(found[STUDENT]) | ffns

    def _late(self) -> bool:
        """Whether the time given has ended."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    # -- phases ----------------------------------------------------------------------------------------------------

    def _arguments(self, directory: Path, stage: Stage) -> Any:
        config = self.config
        micro, accumulation = split_batch(config, 1)
        return run_arguments(
            directory,
            precision=config.precision,
            micro_batch=micro,
            max_steps=stage.total,
            gradient_accumulation_steps=accumulation,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(config.warmup_steps, stage.total // 2),
            weight_decay=0.0,  # the teacher says how large outputs are
            adam_beta2=0.95,
            max_grad_norm=config.clip,
            optim="adamw_torch_fused",
            seed=config.seed,
            data_seed=stage.data_seed,
            eval_steps=config.evaluate_every or max(20, stage.total // 20),
            save_steps=config.checkpoint_every,
            logging_steps=config.log_every,
            remove_unused_columns=False,
            include_num_input_tokens_seen="all" if self.pair.task == "causal" else "non_padding",
        )

    def _trainer(self, stage: Stage, model: Any, seconds: float) -> DistillTrainer:
        choose_trainable(model, "ffn" if stage.name == LAYERS else self.config.trainable)
        tokens = round(self.config.batch * self.text.train_tokens / len(self.text.train))
        return DistillTrainer(
            objective=self.objectives[stage.name],
            stage=stage,
            clock=Clock(seconds, None),
            watch=Watch(
                stage,
                tokens,
                Forecast(self.stages, None),
                lambda state, history: report.write_progress(self.output, self._facts(), state),
            ),
            callbacks=[TimeLimit(self.deadline)] if self.deadline is not None else [],
            model=model,
            args=self._arguments(self.output / stage.name, stage),
            train_dataset=self.text.train,
            eval_dataset=self.text.validation,
            data_collator=self.text.collate,
            processing_class=self.text.tokenizer,
        )

    def _train(self, stage: Stage, start: Path, seconds: float) -> dict[str, Any] | None:
        """Trains one phase, or returns what it recorded before; None if the time ended first.

        Args:
            stage: which.
            start: directory of the student that it starts from.
            seconds: of training before it.
        """
        directory = self.output / stage.name
        record, checkpoint, last_step = where_it_stands(stage, directory)
        if record is not None:
            return record
        if self._late():
            return None
        set_seed(self.config.seed)
        # Stopped after its last step, before its model was in place: the checkpoint is the model.
        trained = last_step >= stage.end
        trainer = self._trainer(stage, self.pair.load_student(checkpoint if trained else start), seconds)
        state: dict[str, Any]
        if trained:
            state = read_json(checkpoint / "trainer_state.json")
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            state = {name: getattr(trainer.state, name) for name in ("log_history", "num_input_tokens_seen")}
            if trainer.state.global_step < stage.end:
                return None
        trainer.save_model(str(directory))
        record = _record(stage, state, seconds) | {"held_out": self._measure(trainer.model)}
        rundir.finish_stage(directory, record)
        return record


def _stages(config: DistillConfig) -> dict[str, Stage]:
    """The phases that have steps, in order, by name."""
    plan = ((LAYERS, config.layer_steps, config.layer_learning_rate), (STUDENT, config.steps, config.learning_rate))
    return {
        name: Stage(
            name=name,
            end=steps,
            total=steps,
            learning_rate=rate,
            switched_learning_rate=rate,
            data_seed=config.seed + number,  # another order of the text
        )
        for number, (name, steps, rate) in enumerate(plan)
        if steps
    }


def _record(stage: Stage, state: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What a phase came to, from the Trainer's state; `seconds` are those of training before it."""
    history = state["log_history"]
    curve = [
        {"step": entry["step"], "seconds": entry["train_seconds"], "loss": entry["eval_loss"]}
        for entry in history
        if "eval_loss" in entry
    ]
    own = curve[-1]["seconds"] - seconds
    return {
        "steps": stage.steps,
        "tokens": state["num_input_tokens_seen"],
        "seconds": curve[-1]["seconds"],
        "own_seconds": own,
        "waiting_share": history[-1].get("waiting_seconds", 0.0) / max(own, 1e-9),
        "validation_loss": curve[-1]["loss"],
        "curve": curve,
    }
