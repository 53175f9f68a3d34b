"""The definition of `neuron_tree`: plain torch, any floating dtype. What this file says is the specification.

T tokens, P trees of L = depth + 1 levels and N = 2**L - 1 nodes, input width D, output width O. Sums are kept in
float32 (float64 for float64), the result is rounded once.

Time and memory are right for a handful of tokens, where it is also the fastest way (`torch_grouped` uses it there):
every token gathers its own weights, `P * T * D` numbers at a time.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastffn.ops.activations import get_activation, get_activation_backward
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.neuron_tree.request import accumulation_dtype, depth_of, path_to


def neuron_tree(
    x_TD: torch.Tensor,
    w_in_PND: torch.Tensor,
    b_in_PN: torch.Tensor | None,
    w_out_PNO: torch.Tensor,
    activation: str = "gelu",
    straight_through: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operation; autograd differentiates it by itself.

    With `straight_through` a decision counts in the backward pass as if it had been a weight, sigmoid(s) for going
    right and 1 - sigmoid(s) for going left, on all that the token met below. Outputs are the same.

    Returns:
        y: `[T, O]` in the dtype of x.
        scores: `[P, T, L]` of the visited nodes, from the root down.
        last: `[P, T]`, the number of the visited node on the lowest level: it tells the whole path.
    """
    trees, neurons, _ = w_in_PND.shape
    wide = accumulation_dtype(x_TD.dtype)
    act = get_activation(activation)
    x = x_TD.to(wide)
    first_row = neurons * torch.arange(trees, device=x.device)[:, None]
    node = torch.zeros(trees, len(x), dtype=torch.int64, device=x.device)
    y = x.new_zeros(len(x), w_out_PNO.shape[2])
    weight = x.new_ones(trees, len(x), 1)
    scores: list[torch.Tensor] = []
    for level in range(depth_of(neurons) + 1):
        if level > 0:
            # A score of exactly zero goes left, and so does one that is not a number.
            node = 2 * node + 1 + (scores[-1] > 0)
        rows = first_row + node
        score = (F.embedding(rows, w_in_PND.flatten(0, 1)).to(wide) * x).sum(-1)
        if b_in_PN is not None:
            score = score + F.embedding(rows, b_in_PN.reshape(-1, 1)).to(wide).squeeze(-1)
        y = y + (weight * act(score).unsqueeze(-1) * F.embedding(rows, w_out_PNO.flatten(0, 1)).to(wide)).sum(0)
        scores.append(score)
        if straight_through:
            right = torch.sigmoid(score)
            chosen = torch.where(score > 0, right, 1 - right).unsqueeze(-1)
            weight = weight * (1 + chosen - chosen.detach())
    return y.to(x_TD.dtype), torch.stack(scores, -1), node


def forward(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    activation: str,
    straight_through: bool,
    *,
    keep: bool,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """`neuron_tree` as dispatch calls it."""
    y, scores, last = neuron_tree(x, w_in, b_in, w_out, activation, straight_through)
    if out is not None:
        y = out.copy_(y)
    return (y, scores, last) if keep else (y,)


def score_gradient(d_act: torch.Tensor, scores: torch.Tensor, activation: str, straight_through: bool) -> torch.Tensor:
    """Gradients of the scores of visited nodes from those of their activations, all `[..., L]` from the root down."""
    d_scores = get_activation_backward(activation)(d_act, scores)
    if straight_through:
        # What the output owes to the nodes below each one: had the decision weighed w, it would owe w times that.
        owed = d_act * get_activation(activation)(scores)
        below = owed.flip(-1).cumsum(-1).flip(-1) - owed
        right = torch.sigmoid(scores)
        slope = right * (1 - right)
        d_scores = d_scores + torch.where(scores > 0, slope, -slope) * below
    return d_scores


def backward(
    gradient_TO: torch.Tensor,
    x_TD: torch.Tensor,
    w_in_PND: torch.Tensor,
    b_in_PN: torch.Tensor | None,
    w_out_PNO: torch.Tensor,
    activation: str,
    straight_through: bool,
    scores_PTL: torch.Tensor,
    last_PT: torch.Tensor,
    *,
    needs: tuple[bool, ...],
) -> Tensors:
    """What autograd makes of `neuron_tree`, in formulas.

    With g the gradient of y, at each visited node: `d act = <g, w_out[n]>`, `d s = act'(s) d act`; then
    `d x += d s w_in[n]`, `d w_in[n] += d s x`, `d b_in[n] += d s`, `d w_out[n] += act(s) g`.
    """
    trees, neurons, _ = w_in_PND.shape
    wide = scores_PTL.dtype
    g, x = gradient_TO.to(wide), x_TD.to(wide)
    rows_PTL = neurons * torch.arange(trees, device=x.device)[:, None, None] + path_to(last_PT, scores_PTL.shape[-1])
    levels = rows_PTL.unbind(-1)
    d_act = [(F.embedding(rows, w_out_PNO.flatten(0, 1)).to(wide) * g).sum(-1) for rows in levels]
    d_scores = score_gradient(torch.stack(d_act, -1), scores_PTL, activation, straight_through).unbind(-1)
    acts = get_activation(activation)(scores_PTL).unbind(-1)
    d_x, d_w_in, d_w_out = (x.new_zeros(t.shape) for t in (x_TD, w_in_PND, w_out_PNO))
    d_b_in = x.new_zeros(trees, neurons)
    for rows, d_score, act in zip(levels, d_scores, acts, strict=True):
        d_x += (d_score.unsqueeze(-1) * F.embedding(rows, w_in_PND.flatten(0, 1)).to(wide)).sum(0)
        flat = rows.flatten()
        d_w_in.flatten(0, 1).index_add_(0, flat, (d_score.unsqueeze(-1) * x).flatten(0, 1))
        d_w_out.flatten(0, 1).index_add_(0, flat, (act.unsqueeze(-1) * g).flatten(0, 1))
        d_b_in.flatten().index_add_(0, flat, d_score.flatten())
    given = (x_TD, w_in_PND, b_in_PN, w_out_PNO)
    gradients = (d_x, d_w_in, d_b_in, d_w_out)
    return tuple(
        d.to(tensor.dtype) if need and tensor is not None else None
        for d, tensor, need in zip(gradients, given, needs, strict=True)
    )


IMPL = Impl(name="reference", forward=forward, backward=backward)
