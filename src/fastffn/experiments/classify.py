"""One FFN as an image classifier: SGD as the FFF paper trained it, and what repairs change about that."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastffn.data.images import Images
from fastffn.errors import ConfigError, TrainingDivergedError
from fastffn.experiments.leaf_losses import leaf_losses
from fastffn.nn import FFN, FFNConfig, LeafUpdates, auxiliary_loss, build
from fastffn.nn.leaf_tree import LeafTreeFFN

# One image of ten is held out of the training images, to choose the epoch by.
HELD_OUT = 0.1
# Images that are evaluated at once.
PIECE = 4096
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained; the learning rate falls linearly to zero.

    Attributes:
        epochs: passes over the training part.
        batch: images in a step.
        optimizer: `sgd` (without momentum, as published) or `adamw`, both without weight decay.
        learning_rate: the first one.
        soften: fraction of the epochs over which a leaf tree's `hardening_weight` rises from 0 to what it is; 0: it is
            constant, as published.
        wait_for: samples that a leaf waits for before it is updated (`LeafUpdates`); 0: none.
        leaf_losses: train a leaf tree on the mixture of its leaves' losses, not on the loss of their mixture.
        input_dropout: probability with which a pixel is dropped in training.
    """

    epochs: int = 40
    batch: int = 256
    optimizer: str = "sgd"
    learning_rate: float = 0.2
    soften: float = 0.0
    wait_for: int = 0
    leaf_losses: bool = False
    input_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks what a user can set."""
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be above 0.")


def train_classifier(config: FFNConfig, images: Images, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Trains one FFN to name the digit; the epoch with the best validation accuracy is kept.

    Args:
        config: of the FFN, widths fitting the images.
        images: see `read_images`.
        recipe: how.
        seed: of the start, of what is held out, and of the order of the images.

    Returns:
        Accuracies in percent, all with hard decisions: `memorisation` (the best on the training part after any epoch),
        `generalisation` (test images), `validation`; `best_epoch` and `parameters`; for leaf trees `busiest` (percent
        of the test images that end at the busiest leaf) and `dead` (leaves that none of them reaches).

    Raises:
        TrainingDivergedError: the loss is no longer a number.
    """
    torch.manual_seed(seed)
    ffn = build(config)
    order = torch.randperm(len(images.train))
    held = max(1, round(HELD_OUT * len(order)))
    x, y = images.train[order[held:]], images.train_labels[order[held:]]
    held_x, held_y = images.train[order[:held]], images.train_labels[order[:held]]
    optimizer = OPTIMIZERS[recipe.optimizer](ffn.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * math.ceil(len(x) / recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    if recipe.wait_for:
        LeafUpdates(optimizer, ffn, recipe.wait_for)
    best, best_epoch, memorised = -1.0, 0, 0.0
    state: dict[str, Any] = {}
    for epoch in range(1, recipe.epochs + 1):
        _soften(ffn, config, recipe, epoch)
        _epoch(ffn, optimizer, schedule, x, y, recipe)
        memorised = max(memorised, accuracy(ffn, x, y))
        found = accuracy(ffn, held_x, held_y)
        if found >= best:
            best, best_epoch, state = found, epoch, copy.deepcopy(ffn.state_dict())
    ffn.load_state_dict(state)
    result = {
        "memorisation": memorised,
        "generalisation": accuracy(ffn, images.test, images.test_labels),
        "validation": best,
        "best_epoch": best_epoch,
        "parameters": sum(p.numel() for p in ffn.parameters()),
    }
    if isinstance(ffn, LeafTreeFFN):
        counts = torch.bincount(ffn.path(images.test).leaf, minlength=ffn.config.leaves)
        result |= {"busiest": 100 * float(counts.max()) / len(images.test), "dead": int((counts == 0).sum())}
    return result


@torch.no_grad()
def accuracy(ffn: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of the images `[N, D]` whose largest output is the label, evaluated as in use: one leaf, one expert."""
    training = ffn.training
    ffn.eval()
    right = sum(
        int((ffn(rows).argmax(1) == labels).sum()) for rows, labels in zip(x.split(PIECE), y.split(PIECE), strict=True)
    )
    ffn.train(training)
    return 100 * right / len(x)


def _soften(ffn: FFN[Any], config: FFNConfig, recipe: Recipe, epoch: int) -> None:
    """Sets the weight of the hardening loss for an epoch."""
    if recipe.soften:
        risen = min(1.0, (epoch - 1) / (recipe.soften * recipe.epochs))
        weight = risen * getattr(config, "hardening_weight", 0.0)
        ffn.config = dataclasses.replace(ffn.config, hardening_weight=weight)


def _epoch(
    ffn: FFN[Any],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    x: torch.Tensor,
    y: torch.Tensor,
    recipe: Recipe,
) -> None:
    ffn.train()
    loss = x.new_zeros(())
    for rows in torch.randperm(len(x)).split(recipe.batch):
        inputs = F.dropout(x[rows], recipe.input_dropout) if recipe.input_dropout else x[rows]
        if recipe.leaf_losses:
            assert isinstance(ffn, LeafTreeFFN)
            loss = leaf_losses(ffn, inputs, y[rows])
        else:
            loss = F.cross_entropy(ffn(inputs), y[rows]) + auxiliary_loss(ffn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(loss.item()):
        raise TrainingDivergedError("The loss is no longer a number; take a smaller learning rate.")
