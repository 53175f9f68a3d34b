"""The definition of `neuron_tree_int8`: plain torch, any device.

A row of weights is its int8 numbers times one float: the tree is the `neuron_tree` of those products. T tokens, P trees
of L = depth + 1 levels and N = 2**L - 1 nodes, input width D, output width O. Sums are kept in float32, the result is
rounded once.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import Impl
from fastffn.ops.neuron_tree.request import depth_of


def forward(
    x_TD: torch.Tensor,
    w_in_PND: torch.Tensor,
    in_scale_PN: torch.Tensor,
    b_in_PN: torch.Tensor | None,
    w_out_PNO: torch.Tensor,
    out_scale_PN: torch.Tensor,
    activation: str,
    *,
    keep: bool,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """`y [T, O]`. Every token gathers its own rows, `P * T * D` numbers at a time."""
    trees, neurons, _ = w_in_PND.shape
    act = get_activation(activation)
    x = x_TD.float()
    first_row = neurons * torch.arange(trees, device=x.device)[:, None]
    node = torch.zeros(trees, len(x), dtype=torch.int64, device=x.device)
    y = x.new_zeros(len(x), w_out_PNO.shape[2])
    for _ in range(depth_of(neurons) + 1):
        rows = first_row + node
        score = (_rows(w_in_PND, rows) * x).sum(-1) * in_scale_PN.flatten()[rows]
        if b_in_PN is not None:
            score = score + b_in_PN.flatten()[rows]
        weight = act(score) * out_scale_PN.flatten()[rows]
        y = y + (weight.unsqueeze(-1) * _rows(w_out_PNO, rows)).sum(0)
        node = 2 * node + 1 + (score > 0)
    y = y.to(x_TD.dtype)
    return (y if out is None else out.copy_(y),)


def _rows(weight_PNK: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return F.embedding(rows, weight_PNK.flatten(0, 1)).float()


IMPL = Impl(name="reference", forward=forward)
