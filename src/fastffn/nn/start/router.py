"""A linear router fitted to what each group of neurons contributes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

STEPS = 300
BATCH = 1024
RATE = 0.01


def fit_router(inputs: torch.Tensor, gain: torch.Tensor, active: int) -> torch.Tensor:
    """Weights `[E, D]` whose `active` largest scores find, for tokens `[S, D]`, the groups of the largest gain.

    Args:
        inputs: `[S, D]`.
        gain: `[S, E]`, at least 0: what is lost where a group is left out.
        active: groups that a token passes.

    The scores are trained as logits of a token's gain, shared out among the `active` best groups. The same result for
    the same input.
    """
    tokens, groups = gain.shape
    best = gain.topk(active, dim=1)
    share = torch.zeros_like(gain).scatter_(1, best.indices, best.values)
    # Each token weighs the same, however much its groups add.
    share = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(gain.dtype).tiny)
    # Inputs of a Transformer differ in size; each weight learns at the pace of its own.
    scale = inputs.square().mean(0).sqrt().clamp_min(torch.finfo(inputs.dtype).tiny)
    rows = inputs / scale
    with torch.enable_grad():
        weight = torch.zeros(groups, inputs.shape[1], dtype=inputs.dtype, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=RATE)
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            chosen = torch.randint(tokens, (min(BATCH, tokens),), generator=generator)
            loss = F.cross_entropy(F.linear(rows[chosen], weight), share[chosen])
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight.detach() / scale
