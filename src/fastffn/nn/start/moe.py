"""A mixture of experts out of a dense FFN: its neurons in groups, each an expert, and a router that finds them.

    1. the neurons that do most for all tokens go into the shared part
    2. the others are put together by the tokens on which they work (`neurons.balanced_groups`)
    3. the router is fitted to what each group adds to a token's output (`router.fit_router`)
    4. with the router's choices made, all weights out of the neurons are fitted to the dense output

With every expert chosen nothing is left over to fit: the output is the dense one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastffn.nn.dense import DenseFFN
from fastffn.nn.start.least_squares import for_few, refit, refit_with_bias
from fastffn.nn.start.neurons import balanced_groups, by_use, columns, contributions, copy_neurons
from fastffn.nn.start.router import fit_router

if TYPE_CHECKING:
    from fastffn.nn.moe import MoEFFN


@torch.no_grad()
def start_moe(moe: MoEFFN, dense: DenseFFN, inputs: torch.Tensor) -> None:
    """Sets the weights of `moe` (its experts' outputs are added up) from `dense` and tokens `[S, D]`."""
    config = moe.config
    assert config.expert_width is not None
    hidden = dense.hidden(inputs)
    wanted = dense.down(hidden)
    contribution = contributions(dense, hidden)
    order = by_use(contribution)
    shared = order[: config.shared]
    rest = order[config.shared :][: config.experts * config.expert_width]
    # Neurons that are never there fill up the last groups.
    missing = config.experts * config.expert_width - len(rest)
    rest = torch.cat((rest, rest.new_full((missing,), len(order))))
    groups = rest[balanced_groups(columns(contribution, rest), config.experts)]

    out = dense.down.weight
    # Where biases can take up a group's mean, only what differs from it is lost with the group.
    added = torch.stack([columns(hidden, group) @ columns(out, group).T for group in groups], 1)  # [S, E, O]
    mean = added.mean(0) if config.bias else torch.zeros_like(added[0])
    moe.router.weight.copy_(fit_router(inputs, (added - mean).square().sum(2), config.active))

    taken = torch.zeros(len(inputs), config.experts)
    taken.scatter_(1, moe.router(inputs).topk(config.active, dim=1).indices, 1.0)
    of_groups = columns(hidden, groups.flatten()) * taken.repeat_interleave(config.expert_width, 1)
    features = torch.cat((columns(hidden, shared), of_groups), 1)
    start = torch.cat((columns(out, shared), columns(out, groups.flatten())), 1)
    constant = None
    if config.bias:
        features, start = torch.cat((features, taken), 1), torch.cat((start, -mean.T), 1)
        fitted, constant = refit_with_bias(features, wanted, start, for_few(features))
    else:
        fitted = refit(features, wanted, start, for_few(features))

    _set(moe, dense, shared, groups)
    down, biases = fitted[:, : len(shared) + groups.numel()], fitted[:, len(shared) + groups.numel() :]
    moe.expert_down_weight.copy_(down[:, len(shared) :].unflatten(1, groups.shape).transpose(0, 1))
    if moe.shared is not None:
        moe.shared.down.weight.copy_(down[:, : len(shared)])
    if constant is not None:
        assert moe.expert_down_bias is not None
        moe.expert_down_bias.copy_(biases.T)
        if moe.shared is not None:
            moe.shared.down.bias.copy_(constant)
        else:
            moe.expert_down_bias.add_(constant / config.active)


def _set(moe: MoEFFN, dense: DenseFFN, shared: torch.Tensor, groups: torch.Tensor) -> None:
    """Copies the weights into the neurons."""
    if moe.shared is not None:
        copy_neurons(dense, moe.shared, shared)
    for name in ("up", "gate") if moe.config.gated else ("up",):
        linear = getattr(dense, name)
        getattr(moe, f"expert_{name}_weight").copy_(columns(linear.weight.T, groups).permute(1, 2, 0))
        if linear.bias is not None:
            getattr(moe, f"expert_{name}_bias").copy_(columns(linear.bias[None], groups)[0])
