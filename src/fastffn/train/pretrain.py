"""`fastffn pretrain`: stages in order, each on the Hugging Face Trainer, and what came of them."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from fastffn.convert.files import new_directory, read_json, write_json
from fastffn.convert.fresh import fresh_model, started_model, trained_model
from fastffn.data.blocks import collate
from fastffn.errors import CheckpointError, ConfigError, OutputError
from fastffn.measure.machine import describe_machine
from fastffn.train import checkpoints, processes, rundir
from fastffn.train.arguments import split_batch, training_arguments
from fastffn.train.config import PretrainConfig
from fastffn.train.disk import full_disk_is_named
from fastffn.train.gain import Gain, advice, measure_gain
from fastffn.train.plan import Stage, plan_stages
from fastffn.train.processes import is_main, on_main, say
from fastffn.train.progress import where_it_stands
from fastffn.train.report import print_report, write_progress, write_report
from fastffn.train.sample import continuation, filled
from fastffn.train.switch import factorise_stage, merge_stage
from fastffn.train.text import check_start, read_text
from fastffn.train.trainer import Clock, StageTrainer
from fastffn.train.watch import Forecast, Watch


def pretrain(config: PretrainConfig, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Pre-trains a language model in stages, and a dense one beside it on the same tokens.

    Started by `torchrun` or `accelerate launch`, the processes share the work.

    Args:
        config: the run; see `PretrainConfig`.
        output: the run directory. If it holds the same run, unfinished, it goes on from the last checkpoint.
        overwrite: delete another run in `output` first.

    Returns:
        What is in `results.json`: stages, curves, the time-to-loss ratio, machine and versions.

    Raises:
        OutputError: `output` holds another run, or another process trains in it.
        DataError: no text, or too little.
        TrainingDivergedError: the loss is no longer a number.
        WriteError: the disk is full.
    """
    if not config.data:
        raise ConfigError("data is missing; this preset has no text of its own. Name a text with --data.")
    output = Path(output)
    processes.join()
    on_main(lambda: check_start(config, output))
    with contextlib.ExitStack() as held, full_disk_is_named(output):
        on_main(lambda: held.enter_context(rundir.locked(output)))
        resumed = on_main(lambda: rundir.check_run(output, config, overwrite=overwrite))
        done = on_main(lambda: read_json(output / "results.json") if _complete(output) and resumed else None)
        if done is not None:
            if is_main():
                print(f"{output} holds this run already, complete; no text was read.")
                print_report(done, output)
            return done
        if resumed:
            say(f"{output} holds this run already; going on from what is complete.")
        # Text first: what is wrong with it should neither delete another run nor leave a half one behind.
        run = _Run(config, output, resumed=resumed)
        if resumed and not on_main(lambda: rundir.same_text(output, run.text.identity)):
            if not overwrite:
                raise OutputError(
                    f"The text ({' or '.join(filter(None, (config.data, config.validation)))})"
                    f"{f', or the checkpoint {config.init_from},' if config.init_from else ''} has changed since the "
                    f"run in {output} was begun; its stages would not be comparable. Restore it, name another "
                    "directory, or pass --overwrite to start anew."
                )
            resumed = False
            run = _Run(config, output, resumed=False)
        on_main(lambda: run.claim(resumed))
        return run.results()


def _complete(output: Path) -> bool:
    return (output / "results.json").is_file()


class _Run:
    """One run: the text, and one method for each thing that happens to it."""

    def __init__(self, config: PretrainConfig, output: Path, *, resumed: bool = False) -> None:
        self.config = config
        self.output = output
        arguments = training_arguments(config, output)  # before any work: it refuses what transformers would
        self.text = read_text(config, output / "tokenizer" if resumed else None)
        self.stages = plan_stages(config, self._steps())
        devices = torch.accelerator.device_count()
        if processes.count() == 1 and devices > 1:
            say(
                f"{devices} devices are visible and one is used; all of them with "
                f"`torchrun --nproc-per-node {devices} -m fastffn pretrain ...`."
            )
        self.device: torch.device = arguments.device
        self.autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        self.gain: Gain | None = None
        self.records: dict[str, Any] = {}

    def claim(self, resumed: bool) -> None:
        """Makes the directory this run's."""
        if resumed:
            rundir.clear_partials(self.output)
        else:
            rundir.claim_run(self.output, self.config)
        rundir.keep_text(self.output, self.text.identity)
        self.text.tokenizer.model_max_length = self.config.sequence
        if not (self.output / "tokenizer").is_dir():
            with new_directory(self.output / "tokenizer") as partial:
                self.text.tokenizer.save_pretrained(partial)

    def _steps(self) -> int:
        """Optimizer steps of a run, or of one stage with `restart`."""
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.epochs is not None
        return max(1, int(self.config.epochs * (len(self.text.train) // self.config.batch)))

    # -- stages ----------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Runs whatever is not done yet, and writes the report."""
        config, records = self.config, self.records
        if config.two_stage:
            self.gain = on_main(self._gain)
        for name in ("dense", "dense_equal_tokens"):
            if name in self.stages:
                records[name] = self._train(self.stages[name])
        if config.two_stage:
            self._train_two_stages()
        elif config.ffn not in records:
            records[config.ffn] = self._train(self.stages[config.ffn])
        return on_main(self._finish)

    def _train_two_stages(self) -> None:
        records = self.records
        start: Path | None = None
        seconds = 0.0
        if "warmup" in self.stages:
            records["warmup"] = self._train(self.stages["warmup"])
            records["factorise"] = on_main(self._factorise)
            start = self.output / "factorised"
            seconds = records["warmup"]["seconds"] + records["factorise"]["seconds"]
        records["stage1"] = self._train(self.stages["stage1"], model=start, seconds=seconds, carry=start is not None)
        records["merge"] = on_main(self._merge)
        seconds = records["stage1"]["seconds"] + records["merge"]["seconds"]
        records["stage2"] = self._train(
            self.stages["stage2"], model=self.output / "merged", seconds=seconds, carry=not self.config.restart
        )

    def _facts(self) -> dict[str, Any]:
        """What a report says, the stages that are done among it."""
        config = self.config
        return {
            "config": config.to_flat(),
            "ffn": type(config.ffn_config()).own_fields(),
            "processes": processes.count(),
            "text": self.text.facts(),
            "gain": self.gain.to_dict() if self.gain else None,
            "stages": dict(self.records),
        }

    def _finish(self) -> dict[str, Any]:
        results = self._facts() | {"machine": describe_machine(), "sample": self._sample()}
        write_report(self.output, results)
        print_report(results, self.output)
        return results

    def _gain(self) -> Gain:
        stage1, stage2 = self.stages["stage1"], self.stages["stage2"]
        share = 0.5 if self.config.restart else stage1.steps / stage2.end
        kept = self.output / "gain.json"
        if kept.is_file():
            return Gain.from_dict(read_json(kept))
        say("Timing a few training steps at this shape ...")
        micro, _ = split_batch(self.config, processes.count())
        steps = sum(stage.steps for name, stage in self.stages.items() if not name.startswith("dense"))
        tokens = steps * self.config.batch * self.config.sequence
        gain = measure_gain(self.config, len(self.text.tokenizer), self.device, self.autocast, share, micro, tokens)
        write_json(kept, gain.to_dict())
        say(
            f"A training step at this shape: dense {gain.dense_seconds:.3f} s, factorised "
            f"{gain.factorised_seconds:.3f} s, {gain.ratio:.2f} times as fast (arithmetic allows {gain.bound:.2f}, an "
            f"FFN that cost nothing {gain.free_ffn_bound:.2f}). "
            f"Stage 1 can save {gain.saving:.0%} of the run's seconds."
        )
        if gain.ratio < 0.97:
            say("Factorised steps are slower here: train dense.")
        elif gain.ratio < 1.05:
            say("Too close to call: at this shape stage 1 gains nothing that could be told from noise.")
        say(advice(gain.tokens_per_parameter))
        return gain

    def _trainer(
        self, stage: Stage, model: Path | Any, *, seconds: float = 0.0, since: float | None = None
    ) -> StageTrainer:
        config = self.config
        if isinstance(model, Path):
            model = trained_model(model)
        clock = Clock(seconds, since)
        return StageTrainer(
            stage=stage,
            clock=clock,
            frobenius=config.frobenius_decay,
            masking=self.text.masking,
            watch=Watch(
                stage,
                config.batch * config.sequence,
                Forecast(self.stages, self.gain),
                lambda state, history: self._report_progress(stage, seconds, state, history),
            ),
            model=model,
            args=training_arguments(config, self.output / stage.name, stage),
            train_dataset=self._whole_batches(),
            eval_dataset=self.text.validation,
            data_collator=collate,
            processing_class=self.text.tokenizer,
        )

    def _whole_batches(self) -> Any:
        """The training blocks without the rest that fills no batch: every step is of the same size."""
        rows = self.text.train
        return rows.select(range(len(rows) // self.config.batch * self.config.batch))

    def _report_progress(self, stage: Stage, seconds: float, state: str, history: list[dict[str, Any]]) -> None:
        facts = self._facts()
        facts["stages"][stage.name] = self._record(stage, history, seconds)
        write_progress(self.output, facts, state)

    def _record(self, stage: Stage, history: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """What a stage came to, or has come to so far.

        Args:
            stage: which.
            history: the Trainer's log entries, those of stages before it included where they were carried over.
            seconds: of training before it.
        """
        curve = [
            {"step": entry["step"], "seconds": entry["train_seconds"], "loss": entry["eval_loss"]}
            for entry in history
            if "eval_loss" in entry and entry["step"] > stage.begin
        ]
        last = curve[-1]
        own = last["seconds"] - seconds
        steps = last["step"] - stage.begin
        return {
            "steps": steps,
            "tokens": steps * self.config.batch * self.config.sequence,
            "seconds": last["seconds"],
            "own_seconds": own,
            "waiting_share": history[-1].get("waiting_seconds", 0.0) / max(own, 1e-9),
            "validation_loss": last["loss"],
            "curve": curve,
        }

    def _train(
        self, stage: Stage, *, model: Path | None = None, seconds: float = 0.0, carry: bool = False
    ) -> dict[str, Any]:
        """Trains one stage, or returns what it recorded when it was trained before.

        Args:
            stage: which.
            model: directory of the model it starts from; None: the start of the run.
            seconds: of training before it.
            carry: whether `model` also holds optimizer, schedule and step count to go on with.
        """
        directory = self.output / stage.name
        record, checkpoint, last_step = on_main(
            lambda: where_it_stands(stage, directory, carried=model if carry else None)
        )
        if record is not None:
            return record
        # Loading what the switch wrote is part of the price of the switch.
        since = time.perf_counter() if carry else None
        if last_step >= stage.end:
            # Stopped after its last step, before its model was in place.
            trainer = self._trainer(stage, checkpoint)
            history = read_json(checkpoint / "trainer_state.json")["log_history"]
        else:
            start = model if model is not None else self._start_model(stage)
            trainer = self._trainer(stage, start, seconds=seconds, since=since)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            history = trainer.state.log_history
        trainer.save_model(str(directory))

        def finish() -> dict[str, Any]:
            record = self._record(stage, history, seconds) | {"loading_seconds": trainer.clock.loading}
            rundir.finish_stage(directory, record)
            return record

        return on_main(finish)

    def _start_model(self, stage: Stage) -> Any:
        config = self.config
        ffn = config.ffn_config() if stage.factorised else None
        if config.init_from is not None:
            return started_model(
                Path(config.init_from),
                ffn,
                seed=config.seed,
                dropout=config.dropout,
                dense_layers=config.dense_layers or 0,
            )
        return fresh_model(
            config.shape(len(self.text.tokenizer)),
            ffn,
            seed=config.seed,
            end_of_text=self.text.tokenizer.eos_token_id,
            dense_layers=config.dense_layers or 0,
        )

    def _final_checkpoint(self, name: str) -> Path:
        """The checkpoint of a finished stage's last step."""
        path = self.output / name / f"checkpoint-{self.stages[name].end}"
        reason = checkpoints.why_incomplete(path)
        if reason is not None:
            raise CheckpointError(
                f"{path} is needed to go on, but {reason}. Delete {self.output / name / rundir.STAGE}: the same "
                "command then trains the end of that stage again."
            )
        return path

    def _factorise(self) -> dict[str, Any]:
        target = self.output / "factorised"
        record = rundir.finished_stage(target)
        if record is not None:
            return record
        shutil.rmtree(target, ignore_errors=True)  # stopped before its time was noted
        begun = time.perf_counter()
        factorise_stage(
            self._final_checkpoint("warmup"),
            target,
            self.config.ffn_config(),
            lambda model: self._trainer(self.stages["stage1"], model),
            dense_layers=self.config.dense_layers or 0,
        )
        record = {"seconds": time.perf_counter() - begun}
        rundir.finish_stage(target, record)
        return record

    def _merge(self) -> dict[str, Any]:
        target = self.output / "merged"
        record = rundir.finished_stage(target)
        if record is not None:
            checkpoints.check_loadable(target)
            return record
        shutil.rmtree(target, ignore_errors=True)  # stopped before its time was noted
        begun = time.perf_counter()
        source = self._final_checkpoint("stage1")
        checkpoints.check_loadable(source)

        def next_trainer(model: Path) -> StageTrainer:
            return self._trainer(self.stages["stage2"], model)

        merged = merge_stage(source, target, None if self.config.restart else next_trainer)
        record = {"seconds": time.perf_counter() - begun, **merged}
        say(f"merged: {len(merged['layers'])} FFNs, {record['seconds']:.1f} s.")
        rundir.finish_stage(target, record)
        return record

    # -- a look at it ----------------------------------------------------------------------------------------------

    def _sample(self) -> dict[str, str]:
        """What the final model makes of held-out text."""
        model = trained_model(self.output / list(self.stages)[-1]).to(self.device).eval()
        tokenizer, block = self.text.tokenizer, self.text.validation[0]["input_ids"].tolist()
        if self.text.masking is not None:
            return filled(model, tokenizer, block, self.text.masking)
        return continuation(model, tokenizer, block, self.config.seed)
