"""Training steps (forward, backward, optimizer) of several models, timed against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastffn.measure.timer import Timing, alternate


def training_step(model: nn.Module, ids: torch.Tensor, autocast: torch.dtype | None = None) -> Callable[[], None]:
    """A call that takes one AdamW step of `model` on the tokens `ids [batch, sequence]`.

    Args:
        model: a language model of transformers, on the device of `ids`.
        ids: random token numbers.
        autocast: dtype of the matrix products; None: that of the parameters.
    """
    model.train()
    # A rate this small keeps the weights, and with them the arithmetic, what they were.
    update = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    kind = ids.device.type

    def step() -> None:
        with torch.autocast(kind, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return step


def random_tokens(batch: int, sequence: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """`[batch, sequence]` token numbers, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (batch, sequence), generator=generator).to(device)


def compare_steps(
    models: Mapping[str, nn.Module],
    *,
    sequence: int,
    vocabulary: int,
    most: int,
    autocast: torch.dtype | None,
    rounds: int,
    seconds_a_step: float,
    seconds: float = math.inf,
) -> tuple[int, dict[str, Timing]]:
    """Times a training step of each model, alternating.

    Args:
        models: language models on one device, by name; the first is the yardstick.
        sequence, vocabulary: of the random tokens.
        most: sequences in a step; fewer if the first model would need more than `seconds_a_step` for them.
        autocast: see `training_step`.
        rounds: timed steps of each model.
        seconds_a_step: see `most`.
        seconds: time there is for all of it; fewer rounds are timed, but two at least, where it does not suffice.

    Returns:
        The number of sequences in the timed step, and the timings.
    """
    device = next(next(iter(models.values())).parameters()).device

    def steps(batch: int) -> dict[str, Any]:
        ids = random_tokens(batch, sequence, vocabulary, device)
        return {name: training_step(model, ids, autocast) for name, model in models.items()}

    first = next(iter(models))
    # An accelerator's first step loads its kernels; on a CPU it is like the others, and may take a minute.
    warmup = 1 if seconds == math.inf or device.type != "cpu" else 0
    single = alternate(steps(1), rounds=1, warmup=warmup)[first].median
    batch = max(1, min(most, int(seconds_a_step / single)))
    affordable = seconds / (len(models) * batch * single)
    return batch, alternate(steps(batch), rounds=int(max(2, min(rounds, affordable))))
