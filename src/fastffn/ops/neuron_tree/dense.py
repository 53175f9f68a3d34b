"""`neuron_tree` by evaluating all neurons of all trees, in chunks of tokens so that memory is bounded.

Every shape has this way out: it is a dense FFN and a mask. It wins where trees are shallow or tokens are many and
matrix products cheap beside everything else.
"""

from __future__ import annotations

from functools import partial

import torch

from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.neuron_tree.masked import descend, spread, tokens_of_chunk
from fastffn.ops.neuron_tree.reference import score_gradient
from fastffn.ops.neuron_tree.request import accumulation_dtype, depth_of, path_to
from fastffn.ops.neuron_tree.routes import why_not


def _chunks(tokens: int, neurons: int) -> list[slice]:
    step = tokens_of_chunk(neurons)
    return [slice(start, start + step) for start in range(0, tokens, step)]


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
    trees, neurons, _ = w_in.shape
    levels = depth_of(neurons) + 1
    wide = accumulation_dtype(x.dtype)
    w_in_DM, w_out_MO = w_in.flatten(0, 1).T, w_out.flatten(0, 1)
    y = x.new_empty(len(x), w_out.shape[2]) if out is None else out
    kept_scores = torch.empty(trees, len(x) if keep else 0, levels, dtype=wide, device=x.device)
    kept_last = torch.empty(kept_scores.shape[:2], dtype=torch.int64, device=x.device)
    for chunk in _chunks(len(x), trees * neurons):
        scores = (x[chunk] @ w_in_DM).view(-1, trees, neurons)
        if b_in is not None:
            scores = scores.to(wide) + b_in
        nodes, visited = descend(scores, levels)
        visited = visited.to(wide)
        hidden = spread(get_activation(activation)(visited), nodes, neurons, x.dtype)
        torch.mm(hidden.flatten(1), w_out_MO, out=y[chunk])
        if keep:
            kept_scores[:, chunk] = visited.transpose(0, 1)
            kept_last[:, chunk] = nodes[..., -1].T
    return (y, kept_scores, kept_last) if keep else (y,)


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
    """See `reference.backward`. Sums over chunks are kept in float32 and go in a fixed order."""
    trees, neurons, _ = w_in.shape
    w_in_MD, w_out_OM = w_in.flatten(0, 1), w_out.flatten(0, 1).T
    nodes = path_to(last, scores.shape[-1])
    d_x = x.new_empty(x.shape) if needs[0] else None
    d_w_in = x.new_zeros(w_in_MD.shape, dtype=scores.dtype) if needs[1] else None
    d_b_in = x.new_zeros(trees * neurons, dtype=scores.dtype) if needs[2] and b_in is not None else None
    d_w_out = x.new_zeros(trees * neurons, w_out.shape[2], dtype=scores.dtype) if needs[3] else None
    for chunk in _chunks(len(x), trees * neurons):
        at = nodes[:, chunk].transpose(0, 1)
        score = scores[:, chunk].transpose(0, 1)
        d_act = (gradient[chunk] @ w_out_OM).view(-1, trees, neurons).gather(-1, at)
        d_score = score_gradient(d_act.to(scores.dtype), score, activation, straight_through)
        d_scores = spread(d_score, at, neurons, x.dtype).flatten(1)
        if d_x is not None:
            torch.mm(d_scores, w_in_MD, out=d_x[chunk])
        if d_w_in is not None:
            d_w_in += d_scores.T @ x[chunk]
        if d_b_in is not None:
            d_b_in += d_scores.sum(0, dtype=scores.dtype)
        if d_w_out is not None:
            hidden = spread(get_activation(activation)(score), at, neurons, x.dtype).flatten(1)
            d_w_out += hidden.T @ gradient[chunk]
    return (
        d_x,
        None if d_w_in is None else d_w_in.to(w_in.dtype).view(w_in.shape),
        None if d_b_in is None or b_in is None else d_b_in.to(b_in.dtype).view(b_in.shape),
        None if d_w_out is None else d_w_out.to(w_out.dtype).view(w_out.shape),
    )


IMPL = Impl(
    name="dense",
    forward=forward,
    backward=backward,
    yields=partial(why_not, "dense"),
    yields_backward=partial(why_not, "dense", backward=True),
)
