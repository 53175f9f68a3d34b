"""The Hugging Face Trainer with what runs need, and with what two stages need: switched matrices, one schedule.

Optimizer groups of a stage, always these three, so that state can pass from one stage to the next:

    0  matrices outside the FFNs' linear maps, with weight decay
    1  biases and norms, without
    2  the FFNs' matrices: factors in stage 1, merged afterwards; they may have a learning rate of their own.
       Those of FFNs that stay dense throughout are in group 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from fastffn.convert.io import REMEDY_TENSOR
from fastffn.convert.match import family_ffns, family_of, fastffn_modules
from fastffn.data.masking import Masking, mask_blocks
from fastffn.errors import TrainingDivergedError
from fastffn.nn import FFN, auxiliary_loss
from fastffn.train import checkpoints
from fastffn.train.plan import Stage

SWITCHED = 2


def parameter_groups(
    model: nn.Module, stage: Stage, decay_names: set[str], weight_decay: float, frobenius: bool
) -> list[dict[str, Any]]:
    """The three groups; parameters come with their names, so that a saved state says whose it is."""
    family = family_of(model.config)
    # Those that stay dense come first, in stage 1, where the others are none of the family's, as in stage 2.
    own = [path for path, _ in family_ffns(model, family)][stage.dense_layers :]
    ours = [path for path, _ in fastffn_modules(model)]
    inside = tuple(f"{path}." for path in ours) + tuple(
        where.at(path) for path in own for where in family.tensors.values()
    )
    groups: list[list[tuple[str, nn.Parameter]]] = [[], [], []]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in decay_names and name.startswith(inside):
            groups[SWITCHED].append((name, parameter))
        else:
            groups[0 if name in decay_names else 1].append((name, parameter))
    product_decay = frobenius and any(decays_product(module) for _, module in fastffn_modules(model))
    return [
        {"params": groups[0], "lr": stage.learning_rate, "weight_decay": weight_decay},
        {"params": groups[1], "lr": stage.learning_rate, "weight_decay": 0.0},
        {
            "params": groups[SWITCHED],
            "lr": stage.switched_learning_rate,
            "weight_decay": 0.0 if product_decay else weight_decay,
        },
    ]


def decays_product(module: FFN[Any]) -> bool:
    """Whether a kind has a decay of what its factors multiply out to."""
    return type(module).decay_product_ is not FFN.decay_product_


def rewarmed(schedule: Any, begin: int, steps: int, step: int) -> float:
    """The schedule at `step`, times a ramp of `steps` steps that starts at `begin`."""
    return float(schedule(step)) * min(1.0, (step - begin + 1) / max(1, steps))


class Clock(TrainerCallback):
    """Seconds spent training: steps and logging, neither validation nor writing checkpoints.

    Attributes:
        seconds: so far, earlier stages and what came before a resumption included.
        waiting: the part of this stage's in which the next batch was waited for.
        loading: the part of this stage's before its first step, where the preparation counts.
    """

    def __init__(self, seconds: float, running_since: float | None) -> None:
        self.seconds = seconds
        self.waiting = 0.0
        self.loading = 0.0
        self._mark = running_since

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts it, unless the preparation counts and it runs already."""
        # Resumed from a checkpoint of this very stage: go on from what the last log entry says.
        logged = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        if logged and logged[-1] > self.seconds:
            self.seconds = logged[-1]
            self.waiting = next((e["waiting_seconds"] for e in state.log_history[::-1] if "waiting_seconds" in e), 0.0)
            self._mark = None
        if self._mark is None:
            self._mark = time.perf_counter()
        else:
            self.loading = time.perf_counter() - self._mark

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the step that ends."""
        now = time.perf_counter()
        self.seconds += now - (self._mark or now)
        self._mark = now

    def waited_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each comes is waiting."""
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waiting += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the validation out."""
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the checkpoint out."""
        self._mark = time.perf_counter()


class StageEnd(TrainerCallback):
    """Ends a stage at its last step, with a validation and a checkpoint, though the schedule goes on."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """See the class."""
        if state.global_step >= self.stage.end:
            control.should_training_stop = True
            control.should_evaluate = True
            control.should_save = True
        # What is saved has to know its own time and loss.
        if control.should_save:
            control.should_log = True
        return control


class RunTrainer(Trainer):
    """The Trainer as every run of ours needs it: a clock, checkpoints known to be whole, a stop before bad numbers.

    Args:
        stage: what it trains, and until which step.
        clock: counts the seconds; its values go into every log entry as `train_seconds` and `waiting_seconds`.
        watch: another callback, which comes before the clock: what it does at a validation is not counted.
    """

    def __init__(self, *, stage: Stage, clock: Clock, watch: TrainerCallback | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.clock = clock
        self.remove_callback(PrinterCallback)  # the watch says it
        for callback in (watch, clock, StageEnd(stage), _RestoreRates(self)):
            if callback is not None:
                self.add_callback(callback)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See `Trainer.get_decay_parameter_names`; a kind may have biases that are not called so."""
        biases = {f"{path}.{name}" for path, ffn in fastffn_modules(model) for name in ffn.BIASES}
        return [name for name in super().get_decay_parameter_names(model) if name not in biases]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """See `Trainer.training_step`; a loss that is no number ends the run before it reaches the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            raise self._diverged(f"The loss is {float(loss)} in step {self.state.global_step + 1}")
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.get_batch_samples`; the clock notes how long batches are waited for."""
        return super().get_batch_samples(self.clock.waited_for(epoch_iterator), *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The validation blocks of one process out of n: every n-th."""
        blocks: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        mine = range(self.args.process_index, len(blocks), self.args.world_size)
        return DataLoader(Subset(blocks, mine), batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See `Trainer.evaluate`."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise self._diverged(f"The validation loss is {metrics['eval_loss']} after step {self.state.global_step}")
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer.save_model`; weights that are no numbers are not written."""
        trained = cast(nn.Module, self.model)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trained.parameters()):
            raise self._diverged(f"Weights are infinite or not numbers after step {self.state.global_step}")
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """See `Trainer._save_checkpoint`; the mark that it is whole comes last, and then old ones go."""
        stage = Path(cast(str, self.args.output_dir))
        directory = stage / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            checkpoints.remove(directory)  # what was left there was not whole, or it would have been gone on from
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(cast(Any, model), trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                checkpoints.mark_complete(directory)
        except BaseException:
            # Room may be what is missing.
            checkpoints.remove(directory)
            raise
        if self.is_world_process_zero():
            checkpoints.remove_old(stage)

    def _diverged(self, what: str) -> TrainingDivergedError:
        return TrainingDivergedError(
            f"{what} of stage '{self.stage.name}'. Training stopped; the last good checkpoint in "
            f"{self.args.output_dir} is kept. Lower the learning rate, lengthen the warm-up, or use bf16 or fp32 "
            "instead of fp16."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`."""
        logs["train_seconds"] = self.clock.seconds
        logs["waiting_seconds"] = self.clock.waiting
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Expected are the tensors that stop whoever loads without FastFFN, and that tied weights are stored once.
        if REMEDY_TENSOR in load_result.unexpected_keys:
            load_result.unexpected_keys.clear()
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)


class StageTrainer(RunTrainer):
    """The Trainer for one stage of pre-training; see the file's head.

    Args:
        stage, clock, watch: see `RunTrainer`.
        frobenius: decay the product of the factors, where the kind knows how.
        masking: for a model that predicts masked tokens. Masks depend on the block, the seed of the data's order and
            the step, those of validation on the block alone.
    """

    def __init__(self, *, frobenius: bool, masking: Masking | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frobenius = frobenius
        self.masking = masking
        if masking is not None:
            # Their losses are means, whatever their signature says; all blocks have as many tokens to predict.
            self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.get_batch_samples`; what is to be predicted is masked."""
        batches = self._masked(epoch_iterator, self.stage.data_seed, self.state.global_step)
        return super().get_batch_samples(batches, *args, **kwargs)

    def _masked(self, batches: Iterator[Any], *key: int) -> Iterator[Any]:
        """The same batches; what a model of masked tokens is to predict is masked."""
        for batch in batches:
            if self.masking is None:
                yield batch
            else:
                seen, labels = mask_blocks(batch["input_ids"], self.masking, *key)
                yield batch | {"input_ids": seen, "labels": labels}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See `Trainer.create_optimizer`."""
        if self.optimizer is None:
            trained = cast(Any, self.model)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            decay = set(self.get_decay_parameter_names(trained))
            groups = parameter_groups(trained, self.stage, decay, self.args.weight_decay, self.frobenius)
            self.optimizer = cls(groups, **options)
            if self.frobenius and self.args.weight_decay:
                # A hook of the optimizer's own: it runs exactly when the optimizer does.
                self.optimizer.register_step_pre_hook(self._decay_products)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _decay_products(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # fp16: where the loss scaling found infinite gradients, a fused optimizer is called and does nothing.
        found = getattr(optimizer, "found_inf", None)
        if found is not None and bool(found):
            return
        amount = optimizer.param_groups[SWITCHED]["lr"] * self.args.weight_decay
        for _, module in fastffn_modules(cast(nn.Module, self.model)):
            module.decay_product_(amount)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """See `Trainer.create_scheduler`; group 2 gets the ramp."""
        fresh = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if fresh and self.stage.rewarm_steps:
            base = scheduler.lr_lambdas[SWITCHED]
            scheduler.lr_lambdas[SWITCHED] = partial(rewarmed, base, self.stage.begin, self.stage.rewarm_steps)
        return scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """See `Trainer.compute_loss`; what the kinds ask for beside the task's loss is added in training."""
        found: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = found
        if model.training:
            extra = auxiliary_loss(cast(nn.Module, self.model))
            # The task's loss is a share of that of the whole step, where the number of its tokens is known.
            parts = self.args.gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + extra / parts
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss of every predicted token of every block, whatever the batches and the number of processes.

        The Trainer's own weights the last, smaller batch like the others, and blocks twice that it repeats to give
        every process as many.
        """
        model = self._wrap_model(cast(Any, self.model), training=False)
        model.eval()
        loss, tokens = 0.0, 0
        # Masked alike at every validation.
        for inputs in self._masked(iter(dataloader)):
            # The first token of a block, which is predicted by none, has no label.
            counted = int((inputs["labels"] != -100).sum())
            # Not prediction_step: it speaks to the other processes at each batch, and they may have one more.
            with torch.no_grad(), self.compute_loss_context_manager():
                mean = model(**self._prepare_inputs(inputs)).loss
            loss += float(mean) * counted
            tokens += counted
        if self.args.world_size > 1:
            parts = gather_object([(loss, tokens)])
            loss, tokens = sum(part[0] for part in parts), sum(part[1] for part in parts)
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        blocks = len(cast(Any, self.eval_dataset))
        return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=blocks)


class _RestoreRates(TrainerCallback):
    """After resuming, sets each group's rate to what the schedule says for the step that comes next.

    An optimizer's saved state holds the rate of the stage that saved it.
    """

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See the class."""
        scheduler: Any = self.trainer.lr_scheduler
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
