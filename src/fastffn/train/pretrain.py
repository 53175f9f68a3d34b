"""`fastffn pretrain`: stages in order, each on the Hugging Face Trainer, and what came of them."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastffn.convert.files import read_json, write_json
from fastffn.convert.fresh import fresh_gpt2
from fastffn.data.blocks import TokenBlocks, collate, token_blocks
from fastffn.data.text import find_text
from fastffn.data.tokenizer import load_tokenizer, train_tokenizer, training_size
from fastffn.errors import CheckpointError, ConfigError, DataError
from fastffn.measure.machine import describe_machine
from fastffn.train import rundir
from fastffn.train.config import PretrainConfig
from fastffn.train.gain import Gain, measure_gain
from fastffn.train.report import print_report, write_report
from fastffn.train.switch import factorise_stage, merge_stage
from fastffn.train.trainer import Clock, Stage, StageTrainer


def pretrain(config: PretrainConfig, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Pre-trains a GPT-2 in stages, and a dense one beside it on the same tokens.

    Args:
        config: the run; see `PretrainConfig`.
        output: the run directory. If it holds the same run, unfinished, it goes on from the last checkpoint.
        overwrite: delete another run in `output` first.

    Returns:
        What is in `results.json`: stages, curves, the time-to-loss ratio, machine and versions.

    Raises:
        OutputError: `output` holds another run.
        DataError: no text, or too little.
        TrainingDivergedError: the loss is no longer a number.
    """
    if not config.data:
        raise ConfigError("data is missing; this preset has no text of its own. Name a text with --data.")
    output = Path(output)
    resumed = rundir.check_run(output, config, overwrite=overwrite)
    if resumed and (output / "results.json").is_file():
        _say(f"{output} holds this run already, complete.")
        results = read_json(output / "results.json")
        print_report(results, output)
        return results
    if resumed:
        _say(f"{output} holds this run already; going on from what is complete.")
    # Text first: what is wrong with it should neither delete another run nor leave a half one behind.
    run = _Run(config, output, resumed=resumed)
    if not resumed:
        rundir.claim_run(output, config)
    rundir.check_text(output, run.blocks.identity, resumed=resumed)
    run.tokenizer.model_max_length = config.sequence
    run.tokenizer.save_pretrained(output / "tokenizer")
    return run.results()


class _Run:
    """One run: the text, and one method for each thing that happens to it."""

    def __init__(self, config: PretrainConfig, output: Path, *, resumed: bool = False) -> None:
        self.config = config
        self.output = output
        self.tokenizer = self._tokenizer(resumed)
        self.blocks = self._blocks()
        self.steps = self._steps()
        self.stages()  # whether the steps suffice for all of them
        arguments = self._arguments(Path(output / "stage1"))
        self.device: torch.device = arguments.device
        self.autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None

    # -- text ------------------------------------------------------------------------------------------------------

    def _tokenizer(self, resumed: bool) -> Any:
        config, saved = self.config, self.output / "tokenizer"
        if resumed and (saved / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(str(saved))
        else:
            size = training_size(config.tokenizer)
            if size is None:
                tokenizer = load_tokenizer(config.tokenizer)
            else:
                source = find_text(config.data, column=config.text_column, separator=config.document_separator)
                tokenizer = train_tokenizer(source, size, progress=sys.stderr.isatty())
        if config.vocabulary is not None and len(tokenizer) != config.vocabulary:
            raise DataError(
                f"The tokenizer '{config.tokenizer}' has {len(tokenizer)} tokens, but vocabulary is "
                f"{config.vocabulary}. Choose the tokenizer that fits, or another vocabulary."
            )
        return tokenizer

    def _blocks(self) -> TokenBlocks:
        config = self.config
        blocks = token_blocks(
            config.data,
            self.tokenizer,
            config.sequence,
            validation=config.validation,
            validation_fraction=config.validation_fraction,
            column=config.text_column,
            separator=config.document_separator,
        )
        _say(
            f"Text: {config.data}, {blocks.train_characters + blocks.validation_characters:,} characters; "
            f"{len(blocks.train) * config.sequence:,} tokens to train on, "
            f"{len(blocks.validation) * config.sequence:,} to validate on; vocabulary {len(self.tokenizer):,}."
        )
        if len(blocks.train) < config.batch:
            raise DataError(
                f"The text makes {len(blocks.train)} blocks of {config.sequence} tokens, fewer than one batch of "
                f"{config.batch}. Give more text, or a smaller --batch."
            )
        return blocks

    def _steps(self) -> int:
        """Optimizer steps of a run, or of one stage with `restart`."""
        if self.config.steps is not None:
            return self.config.steps
        assert self.config.epochs is not None
        return max(1, int(self.config.epochs * (len(self.blocks.train) // self.config.batch)))

    # -- stages ----------------------------------------------------------------------------------------------------

    def stages(self) -> dict[str, Stage]:
        """All stages of the run, by name."""
        config, steps = self.config, self.steps
        rate = config.learning_rate
        dense_rate = config.dense_learning_rate or rate
        factor_rate = config.factor_learning_rate or rate
        plan = []
        if config.baseline:
            plan.append(Stage("dense", False, 0, steps, steps, dense_rate, dense_rate, 0, config.seed))
        if config.restart:
            if config.baseline:
                # As many tokens as both stages together.
                plan.append(
                    Stage(
                        "dense_equal_tokens",
                        False,
                        0,
                        2 * steps,
                        2 * steps,
                        dense_rate,
                        dense_rate,
                        0,
                        config.seed,
                    )
                )
            plan.append(Stage("stage1", True, 0, steps, steps, rate, factor_rate, 0, config.seed))
            # The seed of the second pass over the data, as the baseline sees it.
            plan.append(Stage("stage2", False, 0, steps, steps, rate, rate, 0, config.seed + 1))
        else:
            switch = round(config.switch * steps)
            warm = round(config.dense_warmup * steps)
            if not 0 <= warm < switch < steps:
                raise ConfigError(
                    f"{steps} steps are too few for a switch at {config.switch} and a dense warm-up of "
                    f"{config.dense_warmup}: a stage would be empty. Take more steps."
                )
            rewarm = config.rewarm_steps
            if warm:
                plan.append(Stage("warmup", False, 0, warm, steps, rate, rate, 0, config.seed))
            plan.append(
                Stage("stage1", True, warm, switch, steps, rate, factor_rate, rewarm if warm else 0, config.seed)
            )
            plan.append(Stage("stage2", False, switch, steps, steps, rate, rate, rewarm, config.seed))
        return {stage.name: stage for stage in plan}

    def results(self) -> dict[str, Any]:
        """Runs whatever is not done yet, and writes the report."""
        config, output = self.config, self.output
        stages = self.stages()
        gain = self._gain(stages)
        records: dict[str, Any] = {}
        for name in ("dense", "dense_equal_tokens"):
            if name in stages:
                records[name] = self._train(stages[name], model=None, seconds=0.0)
        seconds = 0.0
        start: Path | None = None
        if "warmup" in stages:
            records["warmup"] = self._train(stages["warmup"], model=None, seconds=0.0)
            begun = time.perf_counter()
            start = output / "factorised"
            record = rundir.finished_stage(start)
            if record is None:
                shutil.rmtree(start, ignore_errors=True)  # stopped before its time was noted
                factorise_stage(
                    self._final_checkpoint("warmup"),
                    start,
                    config.ffn_config(),
                    lambda model: self._trainer(stages["stage1"], model),
                )
                record = {"seconds": time.perf_counter() - begun}
                rundir.finish_stage(start, record)
            records["factorise"] = record
            seconds = records["warmup"]["seconds"] + record["seconds"]
        records["stage1"] = self._train(stages["stage1"], model=start, seconds=seconds, carry=start is not None)
        records["merge"] = self._merge(stages)
        seconds = records["stage1"]["seconds"] + records["merge"]["seconds"]
        records["stage2"] = self._train(
            stages["stage2"], model=output / "merged", seconds=seconds, carry=not config.restart
        )
        results = {
            "config": config.to_flat(),
            "machine": describe_machine(),
            "text": {
                "characters": self.blocks.train_characters + self.blocks.validation_characters,
                "train_tokens": len(self.blocks.train) * config.sequence,
                "validation_tokens": len(self.blocks.validation) * config.sequence,
                "vocabulary": len(self.tokenizer),
            },
            "gain": gain,
            "stages": records,
            "sample": self._sample(),
        }
        write_report(output, results)
        print_report(results, output)
        return results

    def _gain(self, stages: dict[str, Stage]) -> dict[str, Any]:
        stage1, stage2 = stages["stage1"], stages["stage2"]
        share = 0.5 if self.config.restart else (stage1.end - stage1.begin) / stage2.end
        kept = self.output / "gain.json"
        if kept.is_file():
            return read_json(kept)
        _say("Timing a few training steps at this shape ...")
        gain: Gain = measure_gain(self.config, len(self.tokenizer), self.device, self.autocast, share)
        write_json(kept, gain.to_dict())
        _say(
            f"A training step at this shape: dense {gain.dense_seconds:.3f} s, factorised "
            f"{gain.factorised_seconds:.3f} s, {gain.ratio:.2f} times as fast (arithmetic allows {gain.bound:.2f}, an "
            f"FFN that cost nothing {gain.free_ffn_bound:.2f}). "
            f"Stage 1 can save {gain.saving:.0%} of the run's seconds."
        )
        if gain.ratio < 0.97:
            _say("Factorised steps are slower here: train dense.")
        elif gain.ratio < 1.05:
            _say("Too close to call: at this shape stage 1 gains nothing that could be told from noise.")
        return gain.to_dict()

    def _arguments(self, directory: Path, stage: Stage | None = None) -> Any:
        from transformers import TrainingArguments

        config = self.config
        micro = config.micro_batch or config.batch
        processes = _world_size()
        if config.batch % (micro * processes):
            if config.micro_batch is None and config.batch % processes == 0:
                micro = config.batch // processes
            else:
                raise ConfigError(
                    f"batch is {config.batch}; {processes} processes of micro_batch {micro} do not divide it."
                )
        precision = config.precision
        if precision == "auto":
            precision = "bf16" if _accelerator_has_bf16() else "fp32"
        steps = stage.total if stage else 1
        warmup = min(config.warmup_steps, steps // 2)
        if config.schedule == "wsd":
            schedule = "warmup_stable_decay"
            decay = max(1, round(config.decay * steps))
            warmup = min(warmup, max(0, steps - decay))
            options = {
                "num_decay_steps": decay,
                "min_lr_ratio": config.min_lr_ratio,
                "decay_type": "linear",
            }
        else:
            schedule, options = "cosine_with_min_lr", {"min_lr_rate": config.min_lr_ratio}
        return TrainingArguments(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=config.batch // (micro * processes),
            learning_rate=stage.learning_rate if stage else config.learning_rate,
            lr_scheduler_type=schedule,
            lr_scheduler_kwargs=options,
            warmup_steps=warmup,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            max_grad_norm=config.clip,
            optim=config.optimizer,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            torch_compile=config.compile,
            seed=config.seed,
            data_seed=stage.data_seed if stage else config.seed,
            eval_strategy="steps",
            eval_steps=config.evaluate_every,
            eval_on_start=False,
            save_strategy="steps",
            save_steps=config.checkpoint_every,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            prediction_loss_only=True,
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            use_cpu=not torch.accelerator.is_available(),  # without it bf16 is refused on a CPU
            report_to=["tensorboard"],
            disable_tqdm=True,
        )

    def _trainer(
        self, stage: Stage, model: Path | Any, *, seconds: float = 0.0, since: float | None = None
    ) -> StageTrainer:
        from transformers import AutoModelForCausalLM

        config = self.config
        if isinstance(model, Path):
            model = AutoModelForCausalLM.from_pretrained(model)
            model.config.use_cache = False
        return StageTrainer(
            stage=stage,
            clock=Clock(seconds, since),
            tokens_per_step=config.batch * config.sequence,
            frobenius=config.frobenius_decay,
            model=model,
            args=self._arguments(self.output / stage.name, stage),
            train_dataset=self._whole_batches(),
            eval_dataset=self.blocks.validation,
            data_collator=collate,
            processing_class=self.tokenizer,
        )

    def _whole_batches(self) -> Any:
        """The training blocks without the rest that fills no batch: every step is of the same size."""
        rows = self.blocks.train
        return rows.select(range(len(rows) // self.config.batch * self.config.batch))

    def _train(self, stage: Stage, *, model: Path | None, seconds: float, carry: bool = False) -> dict[str, Any]:
        """Trains one stage, or returns what it recorded when it was trained before.

        Args:
            stage: which.
            model: directory of the model it starts from, None for fresh weights.
            seconds: of training before it.
            carry: whether `model` also holds optimizer, schedule and step count to go on with.
        """
        directory = self.output / stage.name
        record = rundir.finished_stage(directory)
        if record is not None:
            rundir.check_loadable(directory)
            _say(f"{stage.name}: done before, {record['steps']} steps.")
            return record
        # Loading what the switch wrote is part of the price of the switch.
        since = time.perf_counter() if carry else None
        start: Any = model
        if start is None:
            start = fresh_gpt2(
                self.config.shape(len(self.tokenizer)),
                self.config.ffn_config() if stage.factorised else None,
                seed=self.config.seed,
                end_of_text=self.tokenizer.eos_token_id,
            )
        checkpoint = rundir.last_checkpoint(directory)
        if checkpoint is not None:
            _say(f"{stage.name}: going on from {checkpoint.name}.")
        elif carry:
            checkpoint = model
        if checkpoint is not None:
            try:
                rundir.check_resumable(checkpoint)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} Delete {checkpoint}: the same command then goes on from what was there before."
                ) from error
        state = read_json(checkpoint / "trainer_state.json") if checkpoint is not None else {}
        if state.get("global_step", 0) >= stage.end:
            # Stopped after its last step, before its model was in place.
            trainer = self._trainer(stage, checkpoint)
            history = state["log_history"]
        else:
            trainer = self._trainer(stage, start, seconds=seconds, since=since)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            history = trainer.state.log_history
        trainer.save_model(str(directory))
        begin = 0 if not carry else stage.begin
        curve = [
            {"step": entry["step"], "seconds": entry["train_seconds"], "loss": entry["eval_loss"]}
            for entry in history
            if "eval_loss" in entry and entry["step"] > begin
        ]
        record = {
            "steps": stage.end - stage.begin,
            "tokens": (stage.end - stage.begin) * self.config.batch * self.config.sequence,
            "seconds": curve[-1]["seconds"],
            "own_seconds": curve[-1]["seconds"] - seconds,
            "validation_loss": curve[-1]["loss"],
            "curve": curve,
        }
        rundir.finish_stage(directory, record)
        return record

    def _final_checkpoint(self, name: str) -> Path:
        checkpoint = rundir.last_checkpoint(self.output / name)
        if checkpoint is None:
            raise DataError(f"{self.output / name} holds no checkpoint; start the run anew with --overwrite.")
        return checkpoint

    def _merge(self, stages: dict[str, Stage]) -> dict[str, Any]:
        target = self.output / "merged"
        record = rundir.finished_stage(target)
        if record is not None:
            rundir.check_loadable(target)
            return record
        shutil.rmtree(target, ignore_errors=True)  # stopped before its time was noted
        begun = time.perf_counter()
        source = self._final_checkpoint("stage1")
        rundir.check_loadable(source)

        def next_trainer(model: Path) -> StageTrainer:
            return self._trainer(stages["stage2"], model)

        merged = merge_stage(source, target, None if self.config.restart else next_trainer)
        record = {"seconds": time.perf_counter() - begun, **merged}
        _say(f"merged: {len(merged['layers'])} FFNs, {record['seconds']:.1f} s.")
        rundir.finish_stage(target, record)
        return record

    # -- a look at it ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(self) -> dict[str, str]:
        """A continuation of held-out text by the final model."""
        from transformers import AutoModelForCausalLM, set_seed

        model: Any = AutoModelForCausalLM.from_pretrained(self.output / "stage2")
        model.to(self.device).eval()
        length = max(1, min(32, self.config.sequence // 4))
        prompt = self.blocks.validation[0]["input_ids"][:length].tolist()
        ids = torch.tensor([prompt], device=self.device)
        set_seed(self.config.seed)
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(64, self.config.sequence - length),
            do_sample=True,
            top_k=50,
            use_cache=True,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return {
            "prompt": self.tokenizer.decode(prompt),
            "continuation": self.tokenizer.decode(generated[0, length:].tolist()),
        }


def _world_size() -> int:
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def _accelerator_has_bf16() -> bool:
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    return bool(torch.accelerator.is_available() and is_torch_bf16_gpu_available())


def _say(text: str) -> None:
    print(text, flush=True)
