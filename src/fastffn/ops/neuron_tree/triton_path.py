"""Each token goes down its path by itself: one launch, whatever the depth. For few tokens, and for trees too deep for
`triton_levels`.

T tokens, P trees of L levels, N nodes, widths D and O. A program takes `BT` tokens. The scores of `HOP` levels, that is
2**HOP - 1 nodes, are computed together before a token moves down: more rows are read, but fewer times is one
waited for before the next is known. Sums over D are float32, in a fixed order.

Backward, of each token: `d act = <g, w_out[n]>`, `d s`, `d x`; the weights' gradients are those of `triton_weights`.
"""

import torch
import triton
import triton.language as tl

from fastffn.ops.neuron_tree.routes import together
from fastffn.ops.neuron_tree.triton_weights import levels_of
from fastffn.ops.triton import FUSED, ceil_div, power_of_two
from fastffn.ops.triton_math import activate, slope

# Elements of a tile in registers: rows of all nodes that are looked at together.
_TILE = 8192


@triton.jit
def _forward(
    x, w_in, b_in, w_out, y, scores, last, tokens, trees, x_stride,
    D: tl.constexpr, O: tl.constexpr, LEVELS: tl.constexpr, HOP: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of BT tokens, tiles of BO outputs]."""
    NODES: tl.constexpr = 2**LEVELS - 1
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < tokens
    token64 = token.to(tl.int64)
    out = tl.program_id(1) * BO + tl.arange(0, BO)
    out_inside = out < O
    keeps = inside & (tl.zeros_like(token) + tl.program_id(1) == 0)  # a scalar mask the interpreter cannot
    total = tl.zeros([BT, BO], tl.float32)
    j = tl.arange(0, 2**HOP)
    level_of, power = levels_of(j, HOP)
    for number in range(trees):
        tree = tl.zeros([], tl.int64) + number
        first = tree * NODES
        root = tl.zeros([BT], tl.int32)
        visited = root
        for top in tl.static_range(0, LEVELS, HOP):
            node = (j[None, :] + power[None, :] * root[:, None]).to(tl.int64)
            known = inside[:, None] & ((j < 2**HOP - 1) & (level_of < LEVELS - top))[None, :]
            terms = tl.zeros([BT, 2**HOP, BD], tl.float32)
            for column in tl.static_range(0, D, BD):
                d = column + tl.arange(0, BD)
                mine = tl.load(
                    x + token64[:, None] * x_stride + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
                )
                row = tl.load(
                    w_in + (first + node)[:, :, None] * D + d[None, None, :],
                    mask=known[:, :, None] & (d < D)[None, None, :],
                    other=0.0,
                )
                terms += mine.to(tl.float32)[:, None, :] * row.to(tl.float32)
            score_of = tl.sum(terms, 2)
            if BIAS:
                score_of += tl.load(b_in + first + node, mask=known, other=0.0).to(tl.float32)
            at = tl.zeros([BT], tl.int32)
            for below in tl.static_range(0, HOP):
                if top + below < LEVELS:
                    score = tl.sum(tl.where(j[None, :] == at[:, None], score_of, 0.0), 1)
                    visited = at + 2**below * root
                    row = tl.load(
                        w_out + (first + visited.to(tl.int64))[:, None] * O + out[None, :],
                        mask=inside[:, None] & out_inside[None, :],
                        other=0.0,
                    )
                    total += activate(score, ACT)[:, None] * row.to(tl.float32)
                    if KEEP:
                        place = (tree * tokens + token64) * LEVELS + top + below
                        tl.store(scores + place, score, mask=keeps)
                    # Zero goes left, and what is not a number.
                    at = 2 * at + 1 + (score > 0).to(tl.int32)
            root = at + 2**HOP * root
        if KEEP:
            tl.store(last + tree * tokens + token64, visited.to(tl.int64), mask=keeps)
    where = y + token64[:, None] * O + out[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=inside[:, None] & out_inside[None, :])


@triton.jit
def _backward(
    gradient, x, w_in, w_out, scores, last, d_scores, d_x, tokens, trees,
    D: tl.constexpr, O: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
    STRAIGHT: tl.constexpr, NEED_X: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of BT tokens, tiles of BD inputs]. ROWS: LEVELS rounded up to a power of two."""
    NODES: tl.constexpr = 2**LEVELS - 1
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < tokens
    token64 = token.to(tl.int64)
    keeps = inside & (tl.zeros_like(token) + tl.program_id(1) == 0)  # a scalar mask the interpreter cannot
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    column_inside = column < D
    total = tl.zeros([BT, BD], tl.float32)
    level = tl.arange(0, ROWS)
    shift = tl.where(level < LEVELS, LEVELS - 1 - level, 0)
    known = inside[:, None] & (level < LEVELS)[None, :]
    for number in range(trees):
        tree = tl.zeros([], tl.int64) + number
        first = tree * NODES
        end = tl.load(last + tree * tokens + token64, mask=inside, other=NODES - 1).to(tl.int32) + 1
        # A node's number plus one is a leading one and the decisions that lead to it.
        node = ((end[:, None] >> shift[None, :]) - 1).to(tl.int64)
        terms = tl.zeros([BT, ROWS, BO], tl.float32)
        for start in tl.static_range(0, O, BO):
            o = start + tl.arange(0, BO)
            mine = tl.load(
                gradient + token64[:, None] * O + o[None, :], mask=inside[:, None] & (o < O)[None, :], other=0.0
            )
            row = tl.load(
                w_out + (first + node)[:, :, None] * O + o[None, None, :],
                mask=known[:, :, None] & (o < O)[None, None, :],
                other=0.0,
            )
            terms += mine.to(tl.float32)[:, None, :] * row.to(tl.float32)
        d_act = tl.sum(terms, 2)
        place = (tree * tokens + token64)[:, None] * LEVELS + level[None, :]
        score = tl.load(scores + place, mask=known, other=0.0)
        d_score = d_act * slope(score, ACT)
        if STRAIGHT:
            owed = tl.where(known, d_act * activate(score, ACT), 0.0)
            below = tl.cumsum(owed, 1, reverse=True) - owed
            right = tl.sigmoid(score)
            change = right * (1.0 - right)
            d_score += tl.where(score > 0, change, -change) * below
        tl.store(d_scores + place, d_score, mask=known & keeps[:, None])
        if NEED_X:
            for step in tl.static_range(0, LEVELS):
                own = tl.sum(tl.where((level == step)[None, :], d_score, 0.0), 1)
                at = ((end >> (LEVELS - 1 - step)) - 1).to(tl.int64)
                row = tl.load(
                    w_in + (first + at)[:, None] * D + column[None, :],
                    mask=inside[:, None] & column_inside[None, :],
                    other=0.0,
                )
                total += own[:, None] * row.to(tl.float32)
    if NEED_X:
        where = d_x + token64[:, None] * D + column[None, :]
        tl.store(where, total.to(d_x.dtype.element_ty), mask=inside[:, None] & column_inside[None, :])


def forward(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor, levels: int, act: str,
    y: torch.Tensor, scores: torch.Tensor | None, last: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills `y [T, O]` and, where given, `scores [P, T, L]` and `last [P, T]`."""
    tokens, d_model = x.shape
    trees, _, d_out = w_out.shape
    tile, hop = together(tokens)
    hop = min(hop, levels)
    out_tile = min(power_of_two(d_out), _TILE // tile)
    _forward[(ceil_div(tokens, tile), ceil_div(d_out, out_tile))](
        x, w_in, w_in if b_in is None else b_in, w_out, y,
        w_in if scores is None else scores, w_in if last is None else last, tokens, trees, x.stride(0),
        D=d_model, O=d_out, LEVELS=levels, HOP=hop, ACT=act, BIAS=b_in is not None, KEEP=scores is not None,
        BT=tile, BD=min(power_of_two(d_model), _TILE // (tile * 2**hop)), BO=out_tile,
        num_warps=8 if max(d_model, d_out) > 2048 else 4, **FUSED,
    )  # fmt: skip


def backward(
    gradient: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, levels: int, act: str,
    straight_through: bool, scores: torch.Tensor, last: torch.Tensor, d_x: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The gradients of the scores `[P, T, L]`; fills `d_x [T, D]` where given."""
    tokens, d_model = x.shape
    trees, _, d_out = w_out.shape
    tile, _ = together(tokens)
    rows = power_of_two(levels)
    in_tile = min(power_of_two(d_model), _TILE // tile)
    d_scores = torch.empty_like(scores)
    _backward[(ceil_div(tokens, tile), 1 if d_x is None else ceil_div(d_model, in_tile))](
        gradient, x, w_in, w_out, scores, last, d_scores, d_scores if d_x is None else d_x, tokens, trees,
        D=d_model, O=d_out, LEVELS=levels, ROWS=rows, ACT=act, STRAIGHT=straight_through, NEED_X=d_x is not None,
        BT=tile, BO=min(power_of_two(d_out), max(16, _TILE // (tile * rows))), BD=in_tile,
        num_warps=8 if max(d_model, d_out) > 2048 else 4, **FUSED,
    )  # fmt: skip
    return d_scores
