"""The definition of `leaf_mixture`, in plain torch and any dtype; autograd gives the gradients.

It is the specification.

Node j has the children 2j + 1 (left) and 2j + 2 (right); below the last nodes hang the leaves, from left to right.
`sigmoid(score)` is the weight of going right. The weight m_l of leaf l is the product along its path.

    y = sum over l of m_l (act(x W_up[l] + b_up[l]) * kept[l]) W_down[l] + b_down[l])         (weights transposed)
"""

from __future__ import annotations

import torch

from fastffn.ops.activations import get_activation


def path_weights(scores: torch.Tensor) -> torch.Tensor:
    """The weight of every leaf: `[T, N]` scores of the nodes, N = 2^depth - 1, to `[T, N + 1]`, each row of sum 1."""
    weights = scores.new_ones(scores.shape[0], 1)
    begin = 0
    while begin < scores.shape[1]:
        level = scores[:, begin : 2 * begin + 1]
        # sigmoid(-s) and not 1 - sigmoid(s): as exact on the left as on the right.
        weights = torch.stack((weights * torch.sigmoid(-level), weights * torch.sigmoid(level)), -1).flatten(1)
        begin = 2 * begin + 1
    return weights


def definition(
    x: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """What the operation computes, with a tensor of `[T, L, O]` on the way. Shapes as in `leaf_mixture`."""
    hidden = get_activation(activation)(torch.einsum("td,lwd->tlw", x, up_weight) + up_bias)
    if kept is not None:
        hidden = hidden * kept
    leaves = torch.einsum("tlw,low->tlo", hidden, down_weight) + down_bias
    return torch.einsum("tl,tlo->to", path_weights(scores), leaves)
