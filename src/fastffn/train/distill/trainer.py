"""The Trainer with an objective between two models, and with a time after which it stops."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from fastffn.train.distill.models import make_ready
from fastffn.train.distill.objectives import Batch, Objective, Sums
from fastffn.train.trainer import RunTrainer

# Of the masks that held-out text gets, each time the same.
_MASK_SEED = 20231117


def held_out(objective: Objective, student: nn.Module, batches: Iterable[Batch], device: torch.device) -> Sums:
    """The objective's sums over held-out text; the same text gives the same masks."""
    student.eval()
    generator = torch.Generator(device=device).manual_seed(_MASK_SEED)
    total: Sums = {}
    for batch in batches:
        moved = {name: value.to(device) for name, value in batch.items()}
        for name, (value, count) in objective.sums(student, moved, generator).items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


class TimeLimit(TrainerCallback):
    """Ends training, with a checkpoint, after the first step at or beyond a moment of `time.monotonic`."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """See the class."""
        if time.monotonic() >= self.deadline:
            control.should_training_stop = True
            control.should_save = True
        return control


class DistillTrainer(RunTrainer):
    """The Trainer for one phase.

    Args:
        objective: what it minimises.
    """

    objective: Objective

    def __init__(self, *, objective: Objective, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective = objective

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """See `Trainer.compute_loss`; it is called in training only."""
        make_ready(cast(nn.Module, self.model))
        loss = self.objective.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The objective on held-out text."""
        with self.compute_loss_context_manager():
            sums = held_out(self.objective, cast(nn.Module, self.model), dataloader, self.args.device)
        loss = self.objective.metrics(sums)["loss"]
        return EvalLoopOutput(
            predictions=cast(Any, None),
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": loss},
            num_samples=len(cast(Any, self.eval_dataset)),
        )
