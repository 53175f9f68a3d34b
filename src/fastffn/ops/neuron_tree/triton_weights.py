"""Gradients of a tree's weights, from those of its scores: no atomics, each number is written once.

A tree of L levels is cut: C = CUT upper levels, and below them S = 2**C subtrees of M = 2**(L - C) - 1 nodes. All
tokens of one subtree have taken the same way to its root r = 2**C - 1 + s. So a program that goes through the tokens
of one subtree, in their own order, holds two sums,

    lower [M, W] += h^T rows     of the subtree's nodes: no other tokens visit them, it is the gradient
    upper [C, W] += h^T rows     of the C nodes above its root: a part, added up afterwards over the subtrees

where `h` holds a token's value for each node that it has visited, zero for the others: `d s` for w_in, with rows of x,
and `act(s)` for w_out, with rows of the gradient of y.

Node j of a subtree, numbered as if it were a tree of its own, is on its level k = floor(log2(j + 1)), and is node
`j + 2**k r` of the whole tree.
"""

import torch
import triton
import triton.language as tl

from fastffn.ops.neuron_tree.request import neurons_of
from fastffn.ops.triton import FUSED, ceil_div, power_of_two, precision, widens
from fastffn.ops.triton_math import activate, product
from fastffn.ops.triton_sort import Sorted

# Levels of a subtree where nothing else asks for a cut.
LOWER_LEVELS = 6
_PARTS = 16


@triton.jit
def levels_of(j, LEVELS: tl.constexpr):
    """`(k, 2**k)` of nodes `j` of a tree of at most so many levels."""
    level = tl.zeros_like(j)
    power = level + 1
    for k in tl.static_range(1, LEVELS):
        level = tl.where(j + 1 >= 2**k, k, level)
        power = tl.where(j + 1 >= 2**k, 2**k, power)
    return level, power


@triton.jit
def _by_subtree(
    values, rows, last, order, starts, ends, d_weight, parts, d_bias, bias_parts, tokens, stride,
    W: tl.constexpr, LEVELS: tl.constexpr, CUT: tl.constexpr, M: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Grid [S * tiles of BW columns, P]; M and C rounded up. ACT: what makes `h` of the values."""
    NODES: tl.constexpr = 2**LEVELS - 1
    SUBTREES: tl.constexpr = 2**CUT
    TILES: tl.constexpr = (W + BW - 1) // BW
    subtree, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    tree = tl.program_id(1).to(tl.int64)
    root = SUBTREES - 1 + subtree
    w = tile * BW + tl.arange(0, BW)
    j = tl.arange(0, M)
    level, power = levels_of(j, LEVELS - CUT)
    real = j < 2 ** (LEVELS - CUT) - 1
    node = j + power * root
    c = tl.arange(0, C)
    lower = tl.zeros([M, BW], tl.float32)
    upper = tl.zeros([C, BW], tl.float32)
    lower_bias = tl.zeros([M], tl.float32)
    upper_bias = tl.zeros([C], tl.float32)
    start = tl.load(starts + tree * SUBTREES + subtree)
    end = tl.load(ends + tree * SUBTREES + subtree)
    for first in range(start, end, BT):
        place = first + tl.arange(0, BT)
        inside = place < end
        token = tl.load(order + tree * tokens + place, mask=inside, other=0).to(tl.int64)
        leaf = tl.load(last + tree * tokens + token, mask=inside, other=0).to(tl.int32) + 1
        visited = (leaf[:, None] >> (LEVELS - 1 - CUT - level)[None, :]) == (node + 1)[None, :]
        visited = visited & inside[:, None] & real[None, :]
        at = values + (tree * tokens + token)[:, None] * LEVELS
        h = tl.load(at + CUT + level[None, :], mask=visited, other=0.0)
        h = tl.where(visited, activate(h, ACT), 0.0)
        lower_bias += tl.sum(h, 0)
        if WEIGHT:
            row = tl.load(
                rows + token[:, None] * stride + w[None, :], mask=inside[:, None] & (w < W)[None, :], other=0.0
            )
            lower = product(tl.trans(h.to(row.dtype)), row, lower, PRECISION, WIDEN)
        if CUT > 0:
            above = inside[:, None] & (c < CUT)[None, :]
            h_above = tl.load(at + c[None, :], mask=above, other=0.0)
            h_above = tl.where(above, activate(h_above, ACT), 0.0)
            upper_bias += tl.sum(h_above, 0)
            if WEIGHT:
                upper = product(tl.trans(h_above.to(row.dtype)), row, upper, PRECISION, WIDEN)
    node64 = tree * NODES + node
    part = (tree * SUBTREES + subtree) * CUT + c
    if WEIGHT:
        mask = real[:, None] & (w < W)[None, :]
        tl.store(d_weight + node64[:, None] * W + w[None, :], lower.to(d_weight.dtype.element_ty), mask=mask)
        if CUT > 0:
            tl.store(parts + part[:, None] * W + w[None, :], upper, mask=(c < CUT)[:, None] & (w < W)[None, :])
    if BIAS and tile == 0:
        tl.store(d_bias + node64, lower_bias.to(d_bias.dtype.element_ty), mask=real)
        if CUT > 0:
            tl.store(bias_parts + part, upper_bias, mask=c < CUT)


@triton.jit
def _above_the_cut(
    parts, d_weight, W: tl.constexpr, LEVELS: tl.constexpr, CUT: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr
):
    """Grid [(S - 1) * tiles of BW columns, P]: a node's gradient is the sum over the subtrees that hang below it."""
    NODES: tl.constexpr = 2**LEVELS - 1
    SUBTREES: tl.constexpr = 2**CUT
    TILES: tl.constexpr = (W + BW - 1) // BW
    node, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    tree = tl.program_id(1).to(tl.int64)
    level, power = levels_of(node, CUT)
    number = SUBTREES // power
    first = (node + 1 - power) * number
    w = tile * BW + tl.arange(0, BW)
    total = tl.zeros([BW], tl.float32)
    for begin in range(0, number, BP):
        one = begin + tl.arange(0, BP)
        at = ((tree * SUBTREES + first + one) * CUT + level)[:, None] * W + w[None, :]
        total += tl.sum(tl.load(parts + at, mask=(one < number)[:, None] & (w < W)[None, :], other=0.0), 0)
    tl.store(d_weight + (tree * NODES + node) * W + w, total.to(d_weight.dtype.element_ty), mask=w < W)


def gradients(
    values: torch.Tensor,
    rows: torch.Tensor,
    last: torch.Tensor,
    sort: Sorted,
    levels: int,
    cut: int,
    act: str,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """Fills what is given of `d_weight [P, N, W]` and `d_bias [P, N]`.

    Args:
        values: `[P, T, L]` float32, from the root down.
        rows: `[T, W]`.
        last: `[P, T]`.
        sort: the tokens by subtree.
        levels, cut: L and C.
        act: what is done to the values; "linear" for nothing.
    """
    trees, subtrees, lower = len(values), 2**cut, neurons_of(levels - cut - 1)
    tokens, width = rows.shape
    width = 1 if d_weight is None else width
    columns = power_of_two(lower, 16)
    # float32 in full precision is multiplied in ordinary registers, of which there are few.
    narrow = rows.dtype != torch.float32
    tile = min(power_of_two(width, 16), (8192 if narrow else 4096) // columns)
    parts = values.new_empty(trees, subtrees, cut, width if d_weight is not None else 0)
    bias_parts = values.new_empty(trees, subtrees, cut)
    _by_subtree[(subtrees * ceil_div(width, tile), trees)](
        values, rows, last, sort.order, sort.starts, sort.ends, values if d_weight is None else d_weight, parts,
        values if d_bias is None else d_bias, bias_parts, tokens, rows.stride(0),
        W=width, LEVELS=levels, CUT=cut, M=columns, C=power_of_two(cut, 16), ACT=act,
        WEIGHT=d_weight is not None, BIAS=d_bias is not None, PRECISION=precision(), WIDEN=widens(rows.dtype),
        BT=64 if narrow else 32, BW=tile, num_warps=8, **FUSED,
    )  # fmt: skip
    if cut:
        for part, whole, wide in ((parts, d_weight, width), (bias_parts, d_bias, 1)):
            if whole is not None:
                tile = min(power_of_two(wide), 256)
                _above_the_cut[((subtrees - 1) * ceil_div(wide, tile), trees)](
                    part, whole, W=wide, LEVELS=levels, CUT=cut, BP=_PARTS, BW=tile, num_warps=4, **FUSED
                )
