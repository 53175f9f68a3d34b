"""Losses that kinds ask for beside the task's: hardening and balance. `fastffn.auxiliary_loss(model)` sums them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def recomputing() -> bool:
    """Whether this runs inside a backward pass: a forward pass is being repeated by gradient checkpointing."""
    # While torch.compile traces there is no backward pass to be inside of.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class AuxiliaryLoss:
    """Mixed into a module: keeps the loss that its last forward pass asks for.

    The last one only: losses of earlier passes that nobody collected would hold their graphs for ever.
    """

    _asked: torch.Tensor | None = None

    def ask(self, loss: torch.Tensor | None) -> None:
        """Keeps the loss of this forward pass, already weighted; None for a pass that asks for none."""
        if not recomputing():
            self._asked = loss

    def __getstate__(self) -> dict[str, Any]:
        # The loss belongs to a graph: it can be neither copied nor pickled, and a copy has seen no pass.
        return {name: value for name, value in self.__dict__.items() if name != "_asked"}


def auxiliary_loss(model: nn.Module) -> torch.Tensor:
    """The losses that the kinds in `model` ask for beside the task's, each with its own weight.

        loss = task_loss + fastffn.auxiliary_loss(model)

    Args:
        model: any module; it has been called in training mode. A module that is called several times in one pass
            counts with its last call. A call that gradient checkpointing repeats does not count again.

    Returns:
        A scalar with a gradient; zero for models whose kinds ask for nothing. Collect it before the backward pass.
    """
    found = [module._asked for module in model.modules() if isinstance(module, AuxiliaryLoss)]
    losses = [loss for loss in found if loss is not None]
    if not losses:
        like = next(model.parameters(), None)
        return torch.zeros((), device=None if like is None else like.device)
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total
