"""Counts of how many tokens went where, kept beside a module's weights and not among them."""

from __future__ import annotations

import torch
from torch import nn

from fastffn.nn.auxiliary import recomputing


def register_counts(module: nn.Module, name: str, size: int) -> None:
    """Gives `module` a buffer `[size]` of whole numbers that is no part of its state dict."""
    module.register_buffer(name, torch.zeros(size, dtype=torch.int64), persistent=False)
    # Made without memory: whoever assigns the weights later has no counts, and may leave anything in the buffer.
    module._counts_nothing = module.get_buffer(name).is_meta  # type: ignore[assignment]


def counts_of(module: nn.Module, name: str) -> torch.Tensor:
    """The buffer, zero where nothing has been counted since the module got memory."""
    buffer = module.get_buffer(name)
    if module._counts_nothing:
        like = next(module.parameters())
        buffer = torch.zeros_like(buffer, device=like.device)
        setattr(module, name, buffer)
        module._counts_nothing = like.is_meta  # type: ignore[assignment]
    return buffer


def add_counts(module: nn.Module, name: str, numbers: torch.Tensor) -> None:
    """Counts `numbers` in the buffer, unless gradient checkpointing repeats a forward pass."""
    if not recomputing():
        buffer = counts_of(module, name)
        buffer += occurrences(numbers, len(buffer))


def occurrences(numbers: torch.Tensor, size: int, of: torch.Tensor | None = None) -> torch.Tensor:
    """How often each number below `size` occurs (where `of` holds): whole numbers, so that their order is no matter."""
    numbers = numbers.flatten()
    ones = torch.ones_like(numbers) if of is None else of.flatten().to(numbers.dtype)
    return numbers.new_zeros(size).index_add(0, numbers, ones)
