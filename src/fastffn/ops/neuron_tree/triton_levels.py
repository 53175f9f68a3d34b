"""A tree in two products: its upper levels for all tokens, then each subtree for the tokens that got there.

T tokens, P trees of L levels, N nodes, widths D and O; C = CUT upper levels, S = 2**C subtrees, see `triton_weights`.

    top       scores of all 2**C - 1 upper nodes of a tile of tokens, one product; the descent is its epilogue
    sort      tokens by subtree (`triton_sort`)
    bottom    tiles of tokens of one subtree: scores of its nodes, one product; descent and activation in the epilogue,
              what is off the path becomes zero; a second product into y. The C nodes above the root are the same for
              all tokens of the tile: they join that product as C more rows.
    bottom backward    the same the other way: <g, w_out>, gradients of scores, a product with w_in

Several trees: y (or dx) is summed in float32, one launch after the other, in the order of the trees.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastffn.ops.neuron_tree.request import neurons_of
from fastffn.ops.neuron_tree.triton_weights import levels_of
from fastffn.ops.triton import FUSED, ceil_div, power_of_two, precision, widens
from fastffn.ops.triton_math import activate, product, slope
from fastffn.ops.triton_sort import Sorted, group_of, sort_by_group, tiles_at_most

# Tokens of a tile.
TILE = 64


def cut_of(levels: int) -> int:
    """How many levels are above the cut: half of them, so that both parts evaluate equally many nodes."""
    return (levels + 1) // 2


@triton.jit
def _top(
    x, w_in, b_in, scores, keys, tokens, x_stride,
    D: tl.constexpr, LEVELS: tl.constexpr, CUT: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of tokens, P]."""
    NODES: tl.constexpr = 2**LEVELS - 1
    tree = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < tokens
    token64 = token.to(tl.int64)
    node = tl.arange(0, M)
    known = node < 2**CUT - 1
    all_scores = tl.zeros([BT, M], tl.float32)
    for column in range(0, D, BD):
        d = column + tl.arange(0, BD)
        mine = tl.load(x + token64[:, None] * x_stride + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        weight = tl.load(
            w_in + (tree * NODES + node)[None, :] * D + d[:, None], mask=known[None, :] & (d < D)[:, None], other=0.0
        )
        all_scores = product(mine, weight, all_scores, PRECISION, WIDEN)
    if BIAS:
        all_scores += tl.load(b_in + tree * NODES + node, mask=known, other=0.0).to(tl.float32)[None, :]
    at = tl.zeros([BT], tl.int32)
    for level in tl.static_range(0, CUT):
        score = tl.sum(tl.where(node[None, :] == at[:, None], all_scores, 0.0), 1)
        tl.store(scores + (tree * tokens + token64) * LEVELS + level, score, mask=inside)
        # Zero goes left, and what is not a number.
        at = 2 * at + 1 + (score > 0).to(tl.int32)
    tl.store(keys + tree * tokens + token64, at - (2**CUT - 1), mask=inside)


@triton.jit
def _bottom(
    x, w_in, b_in, w_out, scores, last, order, starts, ends, tile_ends, before, y, tokens, x_stride, number,
    D: tl.constexpr, O: tl.constexpr, LEVELS: tl.constexpr, CUT: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    S: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid [tiles that there can be]; of tree `number`. y: `before + ...` with ADD."""
    NODES: tl.constexpr = 2**LEVELS - 1
    SUBTREES: tl.constexpr = 2**CUT
    tree = tl.zeros([], tl.int64) + number
    subtree, tile = group_of(tl.program_id(0), tile_ends + tree * SUBTREES, SUBTREES, S)
    if subtree < SUBTREES:
        root = SUBTREES - 1 + subtree
        place = tl.load(starts + tree * SUBTREES + subtree) + tile * BT + tl.arange(0, BT)
        inside = place < tl.load(ends + tree * SUBTREES + subtree)
        token = tl.load(order + tree * tokens + place, mask=inside, other=0).to(tl.int64)
        j = tl.arange(0, M)
        _, power = levels_of(j, LEVELS - CUT)
        real = j < 2 ** (LEVELS - CUT) - 1
        node = tree * NODES + j + power * root
        all_scores = tl.zeros([BT, M], tl.float32)
        for column in range(0, D, BD):
            d = column + tl.arange(0, BD)
            mine = tl.load(
                x + token[:, None] * x_stride + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
            )
            weight = tl.load(w_in + node[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None], other=0.0)
            all_scores = product(mine, weight, all_scores, PRECISION, WIDEN)
        if BIAS:
            all_scores += tl.load(b_in + node, mask=real, other=0.0).to(tl.float32)[None, :]
        own_scores = scores + (tree * tokens + token) * LEVELS
        at = tl.zeros([BT], tl.int32)
        visited = tl.zeros([BT, M], tl.int1)
        for level in tl.static_range(0, LEVELS - CUT):
            here = j[None, :] == at[:, None]
            visited = visited | here
            score = tl.sum(tl.where(here, all_scores, 0.0), 1)
            if KEEP:
                tl.store(own_scores + CUT + level, score, mask=inside)
                if level == LEVELS - CUT - 1:
                    number_of = at + 2 ** (LEVELS - CUT - 1) * root
                    tl.store(last + tree * tokens + token, number_of.to(tl.int64), mask=inside)
            at = 2 * at + 1 + (score > 0).to(tl.int32)
        h = tl.where(visited, activate(all_scores, ACT), 0.0).to(w_out.dtype.element_ty)
        c = tl.arange(0, C)
        above = tree * NODES + ((root + 1) >> tl.where(c < CUT, CUT - c, 0)) - 1
        on_path = inside[:, None] & (c < CUT)[None, :]
        upper = tl.load(own_scores[:, None] + c[None, :], mask=on_path, other=0.0)
        h_above = tl.where(on_path, activate(upper, ACT), 0.0).to(w_out.dtype.element_ty)
        for column in range(0, O, BO):
            o = column + tl.arange(0, BO)
            weight = tl.load(w_out + node[:, None] * O + o[None, :], mask=real[:, None] & (o < O)[None, :], other=0.0)
            total = product(h, weight, tl.zeros([BT, BO], tl.float32), PRECISION, WIDEN)
            weight = tl.load(
                w_out + above[:, None] * O + o[None, :], mask=(c < CUT)[:, None] & (o < O)[None, :], other=0.0
            )
            total = product(h_above, weight, total, PRECISION, WIDEN)
            mask = inside[:, None] & (o < O)[None, :]
            if ADD:
                total += tl.load(before + token[:, None] * O + o[None, :], mask=mask, other=0.0)
            tl.store(y + token[:, None] * O + o[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _bottom_backward(
    gradient, w_in, w_out, scores, last, order, starts, ends, tile_ends, d_scores, before, d_x, tokens, number,
    D: tl.constexpr, O: tl.constexpr, LEVELS: tl.constexpr, CUT: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
    S: tl.constexpr, ACT: tl.constexpr, STRAIGHT: tl.constexpr, NEED_X: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid [tiles that there can be]; of tree `number`. d_x: `before + ...` with ADD."""
    NODES: tl.constexpr = 2**LEVELS - 1
    SUBTREES: tl.constexpr = 2**CUT
    tree = tl.zeros([], tl.int64) + number
    subtree, tile = group_of(tl.program_id(0), tile_ends + tree * SUBTREES, SUBTREES, S)
    if subtree < SUBTREES:
        root = SUBTREES - 1 + subtree
        place = tl.load(starts + tree * SUBTREES + subtree) + tile * BT + tl.arange(0, BT)
        inside = place < tl.load(ends + tree * SUBTREES + subtree)
        token = tl.load(order + tree * tokens + place, mask=inside, other=0).to(tl.int64)
        leaf = tl.load(last + tree * tokens + token, mask=inside, other=0).to(tl.int32) + 1
        j = tl.arange(0, M)
        level_of, power = levels_of(j, LEVELS - CUT)
        real = j < 2 ** (LEVELS - CUT) - 1
        own = j + power * root
        node = tree * NODES + own
        visited = (leaf[:, None] >> (LEVELS - 1 - CUT - level_of)[None, :]) == (own + 1)[None, :]
        visited = visited & inside[:, None] & real[None, :]
        c = tl.arange(0, C)
        above = tree * NODES + ((root + 1) >> tl.where(c < CUT, CUT - c, 0)) - 1
        on_path = inside[:, None] & (c < CUT)[None, :]
        d_act = tl.zeros([BT, M], tl.float32)
        d_above = tl.zeros([BT, C], tl.float32)
        for column in range(0, O, BO):
            o = column + tl.arange(0, BO)
            g = tl.load(gradient + token[:, None] * O + o[None, :], mask=inside[:, None] & (o < O)[None, :], other=0.0)
            weight = tl.load(w_out + node[None, :] * O + o[:, None], mask=real[None, :] & (o < O)[:, None], other=0.0)
            d_act = product(g, weight, d_act, PRECISION, WIDEN)
            weight = tl.load(
                w_out + above[None, :] * O + o[:, None], mask=(c < CUT)[None, :] & (o < O)[:, None], other=0.0
            )
            d_above = product(g, weight, d_above, PRECISION, WIDEN)
        first = (tree * tokens + token)[:, None] * LEVELS
        at, at_above = first + CUT + level_of[None, :], first + c[None, :]
        score = tl.load(scores + at, mask=visited, other=0.0)
        upper = tl.load(scores + at_above, mask=on_path, other=0.0)
        d_score = tl.where(visited, d_act * slope(score, ACT), 0.0)
        d_upper = tl.where(on_path, d_above * slope(upper, ACT), 0.0)
        if STRAIGHT:
            # From the lowest level up: what the output owes to the nodes below.
            owed = tl.where(visited, d_act * activate(score, ACT), 0.0)
            right = tl.sigmoid(score)
            change = right * (1.0 - right)
            change = tl.where(score > 0, change, -change)
            below = tl.zeros([BT], tl.float32)
            for back in tl.static_range(0, LEVELS - CUT):
                here = visited & (level_of == LEVELS - CUT - 1 - back)[None, :]
                d_score += tl.where(here, change * below[:, None], 0.0)
                below += tl.sum(tl.where(here, owed, 0.0), 1)
            owed = tl.where(on_path, d_above * activate(upper, ACT), 0.0)
            right = tl.sigmoid(upper)
            change = right * (1.0 - right)
            change = tl.where(upper > 0, change, -change)
            for back in tl.static_range(0, CUT):
                here = on_path & (c == CUT - 1 - back)[None, :]
                d_upper += tl.where(here, change * below[:, None], 0.0)
                below += tl.sum(tl.where(here, owed, 0.0), 1)
        tl.store(d_scores + at, d_score, mask=visited)
        tl.store(d_scores + at_above, d_upper, mask=on_path)
        if NEED_X:
            h = d_score.to(w_in.dtype.element_ty)
            h_above = d_upper.to(w_in.dtype.element_ty)
            for column in range(0, D, BD):
                d = column + tl.arange(0, BD)
                weight = tl.load(
                    w_in + node[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
                )
                total = product(h, weight, tl.zeros([BT, BD], tl.float32), PRECISION, WIDEN)
                weight = tl.load(
                    w_in + above[:, None] * D + d[None, :], mask=(c < CUT)[:, None] & (d < D)[None, :], other=0.0
                )
                total = product(h_above, weight, total, PRECISION, WIDEN)
                mask = inside[:, None] & (d < D)[None, :]
                if ADD:
                    total += tl.load(before + token[:, None] * D + d[None, :], mask=mask, other=0.0)
                tl.store(d_x + token[:, None] * D + d[None, :], total.to(d_x.dtype.element_ty), mask=mask)


def forward(
    x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor, levels: int, act: str,
    y: torch.Tensor, scores: torch.Tensor | None, last: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills `y [T, O]` and, where given, `scores [P, T, L]` and `last [P, T]`."""
    tokens, d_model = x.shape
    trees, _, d_out = w_out.shape
    cut, keep = cut_of(levels), scores is not None
    if scores is None:  # what hangs between the two products
        scores = x.new_empty(trees, tokens, levels, dtype=torch.float32)
    keys = x.new_empty(trees, tokens, dtype=torch.int32)
    common, columns = _products(x.dtype), _step(x.dtype)
    bias = w_in if b_in is None else b_in
    _top[(ceil_div(tokens, TILE), trees)](
        x, w_in, bias, scores, keys, tokens, x.stride(0),
        D=d_model, LEVELS=levels, CUT=cut, M=power_of_two(neurons_of(cut - 1), 16), BIAS=b_in is not None,
        BD=columns, **common,
    )  # fmt: skip
    sort = sort_by_group(keys, 2**cut, TILE)
    wide = y if trees == 1 else x.new_empty(tokens, d_out, dtype=torch.float32)
    for tree in range(trees):
        _bottom[(tiles_at_most(tokens, 2**cut, TILE),)](
            x, w_in, bias, w_out, scores, keys if last is None else last, *sort,
            wide, y if tree == trees - 1 else wide, tokens, x.stride(0), tree,
            D=d_model, O=d_out, LEVELS=levels, CUT=cut, **_columns(levels, cut), ACT=act, BIAS=b_in is not None,
            KEEP=keep, ADD=tree > 0, BD=columns, BO=columns, **common,
        )  # fmt: skip


def _step(dtype: torch.dtype) -> int:
    """Columns of a tile of weights: of float32, which is multiplied in ordinary registers, fewer."""
    return 32 if dtype == torch.float32 else 64


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """What all kernels here are told about their products."""
    return {"PRECISION": precision(), "WIDEN": widens(dtype), "BT": TILE, "num_warps": 8, "num_stages": 3, **FUSED}


def _columns(levels: int, cut: int) -> dict[str, int]:
    """Nodes of a subtree, levels above it and subtrees, rounded up to what a product takes."""
    return {"M": power_of_two(neurons_of(levels - cut - 1), 16), "C": power_of_two(cut, 16), "S": 2**cut}


def backward(
    gradient: torch.Tensor, x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, levels: int, act: str,
    straight_through: bool, scores: torch.Tensor, last: torch.Tensor, sort: Sorted, d_x: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The gradients of the scores `[P, T, L]`; fills `d_x [T, D]` where given. `sort`: by subtree."""
    tokens, d_model = x.shape
    trees, _, d_out = w_out.shape
    cut, common, columns = cut_of(levels), _products(x.dtype), _step(x.dtype)
    d_scores = torch.empty_like(scores)
    wide = d_scores if d_x is None else d_x
    if d_x is not None and trees > 1:
        wide = x.new_empty(tokens, d_model, dtype=torch.float32)
    for tree in range(trees):
        _bottom_backward[(tiles_at_most(tokens, 2**cut, TILE),)](
            gradient, w_in, w_out, scores, last, *sort, d_scores,
            wide, d_x if d_x is not None and tree == trees - 1 else wide, tokens, tree,
            D=d_model, O=d_out, LEVELS=levels, CUT=cut, **_columns(levels, cut), ACT=act,
            STRAIGHT=straight_through, NEED_X=d_x is not None, ADD=tree > 0,
            BD=columns, BO=columns, **common,
        )  # fmt: skip
    return d_scores
