"""One training step as a call that can be timed: forward, backward, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def training_step(
    model: nn.Module,
    ids: torch.Tensor,
    *,
    autocast: torch.dtype | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> Callable[[], None]:
    """A call that takes one step of `model` on the tokens `ids [batch, sequence]`.

    Args:
        model: a causal language model of transformers, on the device of `ids`.
        ids: random token numbers.
        autocast: dtype of the matrix products; None: that of the parameters.
        optimizer: its class; it gets the parameters and a small learning rate.
    """
    model.train()
    # A rate this small keeps the weights, and with them the arithmetic, what they were.
    update: Any = optimizer(model.parameters(), lr=1e-6)  # type: ignore[call-arg]
    kind = ids.device.type

    def step() -> None:
        with torch.autocast(kind, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return step
