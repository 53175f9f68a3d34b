"""The Hugging Face Trainer with what two stages need: a group of switched matrices, one schedule, a clock.

Optimizer groups, always these three, so that state can pass from one stage to the next:

    0  matrices outside the FFNs' linear maps, with weight decay
    1  biases and norms, without
    2  the FFNs' matrices: factors in stage 1, merged afterwards; they may have a learning rate of their own
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastffn.convert.io import REMEDY_TENSOR
from fastffn.convert.match import family_ffns, family_of, fastffn_modules
from fastffn.errors import TrainingDivergedError
from fastffn.nn import FFN

SWITCHED = 2


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: also that of its directory.
        factorised: whether the FFNs are factorised in it.
        begin, end: optimizer steps; the schedule counts them from the beginning of the run.
        total: steps that the schedule spans.
        learning_rate, switched_learning_rate: peak rates of groups 0 and 1, and of group 2.
        rewarm_steps: steps from `begin` over which group 2's rate rises to the schedule; 0 for none.
        data_seed: seed of the order of the data.
    """

    name: str
    factorised: bool
    begin: int
    end: int
    total: int
    learning_rate: float
    switched_learning_rate: float
    rewarm_steps: int
    data_seed: int


def parameter_groups(
    model: nn.Module, stage: Stage, decay_names: set[str], weight_decay: float, frobenius: bool
) -> list[dict[str, Any]]:
    """The three groups; parameters come with their names, so that a saved state says whose it is."""
    family = family_of(model.config)
    own = [path for path, _ in family_ffns(model, family)]
    ours = [path for path, _ in fastffn_modules(model)]
    inside = tuple(f"{path}." for path in own + ours)
    groups: list[list[tuple[str, nn.Parameter]]] = [[], [], []]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim >= 2 and name.startswith(inside):
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
    """

    def __init__(self, seconds: float, running_since: float | None) -> None:
        self.seconds = seconds
        self._mark = running_since

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts it, unless the preparation counts and it runs already."""
        # Resumed from a checkpoint of this very stage: go on from what the last log entry says.
        logged = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        if logged and logged[-1] > self.seconds:
            self.seconds = logged[-1]
            self._mark = None
        if self._mark is None:
            self._mark = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the step that ends."""
        now = time.perf_counter()
        self.seconds += now - (self._mark or now)
        self._mark = now

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


class Console(TrainerCallback):
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, stage: Stage, tokens_per_step: int) -> None:
        self.stage = stage
        self.tokens_per_step = tokens_per_step
        self.bar: Any = None
        self.interactive = sys.stderr.isatty()
        self._last = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
        logged = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self._last = (state.global_step, logged[-1] if logged else 0.0)
        if self.interactive and state.is_world_process_zero:
            self.bar = tqdm(
                total=self.stage.end,
                initial=state.global_step,
                desc=self.stage.name,
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows losses and speed."""
        logs = logs or {}
        if not state.is_world_process_zero or ("loss" not in logs and "eval_loss" not in logs):
            return
        if self.bar is not None:
            if "eval_loss" in logs:
                self.bar.write(self._line(state, logs), file=sys.stderr)
            else:
                self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
            return
        print(self._line(state, logs), flush=True)

    def _line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        if "eval_loss" in logs:
            what = f"validation loss {logs['eval_loss']:.4f}"
        else:
            step, before = self._last
            self._last = (state.global_step, logs["train_seconds"])
            speed = (state.global_step - step) * self.tokens_per_step / max(1e-9, logs["train_seconds"] - before)
            what = f"loss {logs['loss']:.4f}  rate {logs['learning_rate']:.2e}  {speed:,.0f} tokens/s"
        return f"{self.stage.name}  step {state.global_step}/{self.stage.end}  {what}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StageTrainer(Trainer):
    """The Trainer for one stage; see the file's head.

    Args:
        stage: which.
        clock: counts the seconds; its value goes into every log entry as `train_seconds`.
        frobenius: decay the product of the factors, where the kind knows how.
    """

    def __init__(self, *, stage: Stage, clock: Clock, frobenius: bool, tokens_per_step: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.clock = clock
        self.frobenius = frobenius
        self.remove_callback(PrinterCallback)  # Console says it
        for callback in (clock, StageEnd(stage), Console(stage, tokens_per_step), _RestoreRates(self)):
            self.add_callback(callback)

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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """See `Trainer.training_step`; a loss that is no number ends the run before it reaches the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            raise self._diverged(f"The loss is {float(loss)} in step {self.state.global_step + 1}")
        return loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """See `Trainer.get_eval_dataloader`; every block counts, those of a last, smaller batch too."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

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

    def _diverged(self, what: str) -> TrainingDivergedError:
        return TrainingDivergedError(
            f"{what} of stage '{self.stage.name}'. Training stopped; the last good checkpoint in "
            f"{self.args.output_dir} is kept. Lower the learning rate, lengthen the warm-up, or use bf16 or fp32 "
            "instead of fp16."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`."""
        logs["train_seconds"] = self.clock.seconds
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Expected are the tensors that stop whoever loads without FastFFN, and that tied weights are stored once.
        if REMEDY_TENSOR in load_result.unexpected_keys:
            load_result.unexpected_keys.clear()
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)


class _RestoreRates(TrainerCallback):
    """After resuming, sets each group's rate to what the schedule says for the step that comes next.

    An optimizer's saved state holds the rate of the stage that saved it.
    """

    def __init__(self, trainer: StageTrainer) -> None:
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
