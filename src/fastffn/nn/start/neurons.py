"""What each hidden neuron of a dense FFN contributes to its output, and neurons put together that work together.

    contribution of neuron n to token x:  |h_n(x)| ||down.weight[:, n]||, the length of what it adds to the output

The idea of MoEfication (Zhang et al., arXiv 2110.01786): few neurons do most of a token's work, and which ones they
are can be told from the token.
"""

from __future__ import annotations

import torch

from fastffn.nn.dense import DenseFFN

# Neurons are compared by their contributions to this many mixtures of tokens.
SKETCH = 64
ROUNDS = 20


def contributions(dense: DenseFFN, hidden: torch.Tensor) -> torch.Tensor:
    """Of each neuron to each token's output: `[S, H]`, from the hidden activations `[S, H]`."""
    return hidden.abs() * dense.down.weight.norm(dim=0)


def by_use(contribution: torch.Tensor) -> torch.Tensor:
    """The neurons `[H]`, those that add most to the tokens `[S, H]` (in the mean of squares) first."""
    return contribution.square().mean(0).argsort(descending=True, stable=True)


def columns(matrix: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Columns of `matrix [m, n]` by number; that of number n is zero: `[m, ...]`."""
    return torch.cat((matrix, matrix.new_zeros(len(matrix), 1)), 1)[:, numbers]


def copy_neurons(dense: DenseFFN, part: DenseFFN, neurons: torch.Tensor) -> None:
    """Makes a narrower FFN `part` of the neurons of `dense` with those numbers; the bias of its output is zero."""
    for name in ("up", "gate") if dense.config.gated else ("up",):
        old, new = getattr(dense, name), getattr(part, name)
        new.weight.copy_(old.weight[neurons])
        if new.bias is not None:
            new.bias.copy_(torch.zeros(len(neurons)) if old.bias is None else old.bias[neurons])
    part.down.weight.copy_(dense.down.weight[:, neurons])
    if part.down.bias is not None:
        part.down.bias.zero_()


def balanced_groups(contribution: torch.Tensor, groups: int) -> torch.Tensor:
    """Neurons that contribute to the same tokens together, in groups of equal size.

    Args:
        contribution: `[S, n]`; `groups` divides n.

    Returns:
        `[groups, n / groups]`, numbers of neurons, ascending within a group. Balanced k-means, the same for the same
        input.
    """
    tokens, neurons = contribution.shape
    size = neurons // groups
    generator = torch.Generator().manual_seed(0)
    # What sets a neuron apart is on which tokens it works, not how much it does overall.
    profile = contribution / contribution.norm(dim=0).clamp_min(torch.finfo(contribution.dtype).tiny)
    profile = profile - profile.mean(1, keepdim=True)
    mixtures = torch.randn(min(SKETCH, tokens), tokens, generator=generator, dtype=contribution.dtype)
    points = (mixtures @ profile).T  # [n, SKETCH]; distances survive a random projection
    centres = points[torch.randperm(neurons, generator=generator)[:groups]]
    owner = torch.full((neurons,), -1)
    for _ in range(ROUNDS):
        before, owner = owner, _balanced_owners(torch.cdist(points, centres), size)
        if torch.equal(before, owner):
            break
        centres = torch.zeros_like(centres).index_add_(0, owner, points) / size
    return owner.argsort(stable=True).view(groups, size)


def _balanced_owners(distance: torch.Tensor, size: int) -> torch.Tensor:
    """The group of each neuron, `[n, groups]` to `[n]`, `size` in each: nearest first, a full group takes no more."""
    neurons, groups = distance.shape
    owner = torch.full((neurons,), -1)
    room = torch.full((groups,), size)
    distance = distance.clone()
    while (free := (owner < 0).nonzero().squeeze(1)).numel():
        nearest = distance[free].min(1)
        for group in nearest.indices.unique().tolist():
            asking = free[nearest.indices == group]
            order = distance[asking, group].argsort(stable=True)[: int(room[group])]
            owner[asking[order]] = group
            room[group] -= len(order)
            if not room[group]:
                distance[:, group] = float("inf")
    return owner
