"""`neuron_tree` from plain torch operators, sparse in work and memory.

T tokens, P trees of L levels, input width D, output width O. A tree is cut in two: the `cut` upper levels, which all
tokens go through, are one dense product and a path within it; below hang `2**cut` subtrees of M = 2**(L - cut) - 1
nodes. Tokens are sorted by subtree, each subtree is one small dense product over its tokens. A token costs
`2**cut - 1 + M` neurons instead of `2**L - 1`: 126 instead of 4095 for a tree of depth 11 cut in the middle.

Sorting is stable and every sum over tokens is one matrix product over a segment: results and gradients are the same
from run to run. The sizes of the segments are read back, once a tree: an accelerator waits for it.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import torch

from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.neuron_tree import reference
from fastffn.ops.neuron_tree.masked import descend, spread
from fastffn.ops.neuron_tree.reference import score_gradient
from fastffn.ops.neuron_tree.request import Request, accumulation_dtype, depth_of, neurons_of, path_to, request_of
from fastffn.ops.neuron_tree.routes import best_cut, walks, why_not


class _Segment(NamedTuple):
    """The tokens of one subtree: which rows they are once sorted, and the subtree's nodes, root first, by levels."""

    rows: slice
    nodes: torch.Tensor


def _subtrees(levels: int, cut: int, device: torch.device) -> torch.Tensor:
    """`[2**cut, M]`: the numbers of the nodes of each subtree that begins on level `cut`, by levels."""
    root = torch.arange(2**cut, device=device)[:, None]
    parts = [
        2 ** (cut + level) - 1 + root * 2**level + torch.arange(2**level, device=device)
        for level in range(levels - cut)
    ]
    return torch.cat(parts, 1)


def _sorted(subtree: torch.Tensor, nodes: torch.Tensor) -> tuple[torch.Tensor, list[_Segment]]:
    """The order of the tokens by the number of their subtree, and the segments that are not empty."""
    keys, order = torch.sort(subtree, stable=True)
    numbers = torch.arange(len(nodes) + 1, device=keys.device)
    bounds = torch.searchsorted(keys, numbers).tolist()
    segments = [
        _Segment(slice(start, stop), nodes[number])
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
        if stop > start
    ]
    return order, segments


def _inverse(order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


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
    """See `reference.neuron_tree`."""
    trees, neurons, d_model = w_in.shape
    tokens, levels, d_out = len(x), depth_of(neurons) + 1, w_out.shape[2]
    if walks(request_of(x, w_in, b_in, w_out, activation, straight_through)):
        return reference.forward(x, w_in, b_in, w_out, activation, straight_through, keep=keep, out=out)
    wide = accumulation_dtype(x.dtype)
    act = get_activation(activation)
    cut = best_cut(tokens, levels, d_model + d_out, x.dtype)
    upper = neurons_of(cut - 1)
    subtrees = _subtrees(levels, cut, x.device)
    total: torch.Tensor | None = None
    kept_scores, kept_last = [], []
    for tree in range(trees):
        bias = None if b_in is None else b_in[tree]
        scores = x @ w_in[tree, :upper].T
        if bias is not None:
            scores = scores.to(wide) + bias[:upper]
        upper_nodes, upper_scores = descend(scores, cut)
        subtree = 2 * upper_nodes[:, -1] + 1 + (upper_scores[:, -1] > 0) - upper
        order, segments = _sorted(subtree, subtrees)

        x_sorted = x.index_select(0, order)
        scores = x.new_empty(tokens, subtrees.shape[1])
        for rows, nodes in segments:
            torch.mm(x_sorted[rows], w_in[tree].index_select(0, nodes).T, out=scores[rows])
        if bias is not None:
            scores = scores.to(wide) + bias[subtrees][subtree[order]]
        lower_nodes, lower_scores = descend(scores, levels - cut)

        upper_hidden = spread(act(upper_scores[order].to(wide)), upper_nodes[order], upper, x.dtype)
        lower_hidden = spread(act(lower_scores.to(wide)), lower_nodes, subtrees.shape[1], x.dtype)
        y_sorted = upper_hidden @ w_out[tree, :upper]
        for rows, nodes in segments:
            y_sorted[rows].addmm_(lower_hidden[rows], w_out[tree].index_select(0, nodes))

        inverse = _inverse(order)
        y = y_sorted.index_select(0, inverse)
        total = y if total is None else total.to(wide).add_(y)
        if keep:
            kept_scores.append(torch.cat([upper_scores, lower_scores.index_select(0, inverse)], 1).to(wide))
            last_of_sorted = subtrees[subtree[order], lower_nodes[:, -1]]
            kept_last.append(last_of_sorted.index_select(0, inverse))
    assert total is not None
    y = total.to(x.dtype) if out is None else out.copy_(total)
    return (y, torch.stack(kept_scores), torch.stack(kept_last)) if keep else (y,)


def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    activation: str,
    straight_through: bool,
    scores: torch.Tensor,
    last: torch.Tensor,
    *,
    needs: tuple[bool, ...],
) -> Tensors:
    """See `reference.backward`; tokens are sorted and trees cut as in the forward pass, at this pass's best level."""
    trees, neurons, d_model = w_in.shape
    tokens, levels, d_out = len(x), depth_of(neurons) + 1, w_out.shape[2]
    wide = scores.dtype
    cut = best_cut(tokens, levels, d_model + d_out, x.dtype, backward=True)
    upper = neurons_of(cut - 1)
    subtrees = _subtrees(levels, cut, x.device)
    total: torch.Tensor | None = None
    # Nodes that no token visits have gradient zero.
    d_w_in = w_in.new_zeros(w_in.shape) if needs[1] else None
    d_b_in = b_in.new_zeros(b_in.shape) if needs[2] and b_in is not None else None
    d_w_out = w_out.new_zeros(w_out.shape) if needs[3] else None
    for tree in range(trees):
        path = path_to(last[tree], levels)
        subtree = path[:, cut] - upper
        order, segments = _sorted(subtree, subtrees)
        g, score = gradient.index_select(0, order), scores[tree].index_select(0, order)
        path = path.index_select(0, order)
        upper_nodes = path[:, :cut]
        # Numbers within the subtree: what its root's descendants k levels down would bear if it were a tree of its own.
        below = torch.arange(levels - cut, device=x.device)
        lower_nodes = path[:, cut:] - (path[:, cut : cut + 1] << below)

        d_upper = (g @ w_out[tree, :upper].T).gather(1, upper_nodes)
        d_lower = g.new_empty(tokens, subtrees.shape[1])
        for rows, nodes in segments:
            torch.mm(g[rows], w_out[tree].index_select(0, nodes).T, out=d_lower[rows])
        d_act = torch.cat([d_upper, d_lower.gather(1, lower_nodes)], 1).to(wide)
        d_score = score_gradient(d_act, score, activation, straight_through)
        d_upper = spread(d_score[:, :cut], upper_nodes, upper, x.dtype)
        d_lower = spread(d_score[:, cut:], lower_nodes, subtrees.shape[1], x.dtype)

        if d_w_out is not None:
            hidden = get_activation(activation)(score)
            d_w_out[tree, :upper] = spread(hidden[:, :cut], upper_nodes, upper, x.dtype).T @ g
            lower_hidden = spread(hidden[:, cut:], lower_nodes, subtrees.shape[1], x.dtype)
            for rows, nodes in segments:
                d_w_out[tree].index_copy_(0, nodes, lower_hidden[rows].T @ g[rows])
        del g
        if d_b_in is not None:
            d_b_in[tree, :upper] = d_upper.sum(0)
            for rows, nodes in segments:
                d_b_in[tree].index_copy_(0, nodes, d_lower[rows].sum(0))
        if d_w_in is not None:
            x_sorted = x.index_select(0, order)
            d_w_in[tree, :upper] = d_upper.T @ x_sorted
            for rows, nodes in segments:
                d_w_in[tree].index_copy_(0, nodes, d_lower[rows].T @ x_sorted[rows])
            del x_sorted
        if needs[0]:
            d_x = d_upper @ w_in[tree, :upper]
            for rows, nodes in segments:
                d_x[rows].addmm_(d_lower[rows], w_in[tree].index_select(0, nodes))
            d_x = d_x.index_select(0, _inverse(order))
            total = d_x if total is None else total.to(wide).add_(d_x)
    return (None if total is None else total.to(x.dtype), d_w_in, d_b_in, d_w_out)


def _refuses(request: Request) -> str | None:
    return "needs a tree of at least two levels" if request.depth == 0 else None


IMPL = Impl(
    name="torch_grouped",
    forward=forward,
    backward=backward,
    refuses=_refuses,
    yields=partial(why_not, "torch_grouped"),
    yields_backward=partial(why_not, "torch_grouped", backward=True),
)
