"""What distillation minimises, on tensors: divergence of logits, distance of states.

B sentences, T tokens of a sentence, N tokens of a batch, D width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

# Logits that exist at once: 64 MB in float32, and a few times as much while they are worked on.
LOGITS_AT_ONCE = 2**24


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) of each token's distribution: logits `[N, V]` to `[N]`, in nats."""
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def chunks(tokens: int, vocabulary: int, at_once: int = LOGITS_AT_ONCE) -> Iterator[slice]:
    """Slices of so many tokens that their logits fit into `at_once` numbers."""
    size = max(1, at_once // vocabulary)
    for begin in range(0, tokens, size):
        yield slice(begin, min(begin + size, tokens))


Part = Callable[[torch.Tensor, slice], torch.Tensor]


def chunked_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    part: Part,
    *,
    at_once: int = LOGITS_AT_ONCE,
) -> torch.Tensor:
    """A sum over tokens of what `part` makes of their logits `features @ weight.T + bias`, in chunks of tokens.

    Neither all logits nor all of their gradients ever exist: each chunk's gradient is taken at once.

    Args:
        features: `[N, D]`; weight: `[V, D]`; bias: `[V]` or None.
        part: takes logits `[n, V]` and the slice of tokens that they are of; returns a scalar, the chunk's share.
        at_once: logits that may exist at the same time.

    Returns:
        A float32 scalar with a gradient to features, weight and bias.
    Memory: `at_once` logits, and one gradient of each argument.
    """
    total: torch.Tensor = _ChunkedLoss.apply(features, weight, bias, part, at_once)
    return total


class _ChunkedLoss(torch.autograd.Function):
    """See `chunked_loss`: the gradient is made in the forward pass, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, part: Part, at_once: int
    ) -> torch.Tensor:
        given = (features, weight, bias)
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros_like(x) if need and x is not None else None for x, need in zip(given, wanted, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=features.device)
        w = weight.detach().requires_grad_(wanted[1])
        b = None if bias is None else bias.detach().requires_grad_(wanted[2])
        for rows in chunks(len(features), len(weight), at_once):
            x = features[rows].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)):
                share = part(F.linear(x, w, b), rows)
            total += share.detach()
            leaves = [leaf for leaf, need in zip((x, w, b), wanted, strict=True) if need and leaf is not None]
            if not leaves or not share.requires_grad:
                continue
            found = iter(torch.autograd.grad(share, leaves))
            if gradients[0] is not None:
                gradients[0][rows] = next(found)
            for gradient in gradients[1:]:
                if gradient is not None:
                    gradient += next(found)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [None if x is None else x * outer[0].to(x.dtype) for x in ctx.saved_tensors]
        return (*scaled, None, None)


def squared_error(found: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of squared differences, and sum of squares of what was wanted: their ratio is the normalised error."""
    return (found.float() - wanted.float()).square().sum(), wanted.float().square().sum()


def mean_pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Means of each sentence's unpadded tokens: `[B, T, D]` and `[B, T]` to `[B, D]`, float32."""
    weights = mask[..., None].float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1)


def cosine_distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """One minus the cosine, row by row: `[B, D]` twice to `[B]`."""
    return 1 - F.cosine_similarity(found.float(), wanted.float(), dim=-1)
