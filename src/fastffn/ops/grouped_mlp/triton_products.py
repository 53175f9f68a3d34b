"""Products of the tokens of each MLP with its weights, and of tokens with tokens for the weights' gradients.

T tokens sorted by MLP (`triton_sort`), E MLPs of widths D -> W -> O; tokens of no MLP come last, as if of one more.
Rows of x, y and the gradient are fetched and put by `order`; `up`, `gate`, what comes of them and its gradients lie
sorted.

    up         up = x W_up^T + b, gate likewise, a = act(up), gated act(gate) up       [T, W]
    down       y = a W_down^T + b                                                      [T, O]
    up back    of a = g W_down, from it of up and of gate, and a once more             [T, W]
    down back  of x = (of up) W_up + (of gate) W_gate                                  [T, D]
    outer      of W = left^T right over the tokens of an MLP, in their order           [E, *, *]

All sums are float32 in a fixed order; each number is written by one program.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastffn.ops.triton import FUSED, ceil_div, power_of_two, precision, widens
from fastffn.ops.triton_math import activate, product, slope
from fastffn.ops.triton_sort import Sorted, group_of, tiles_at_most

# Tokens of a tile.
TILE = 64


@triton.jit
def _up(
    x, order, starts, ends, tile_ends, w_up, b_up, w_gate, b_gate, up, gate, hidden, x_stride, E,
    D: tl.constexpr, W: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, UP_BIAS: tl.constexpr,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid [tiles that there can be, tiles of BN columns of W]."""
    mlp, tile = group_of(tl.program_id(0), tile_ends, E, G)
    if mlp < E:  # rows of no MLP are left undefined
        place = tl.load(starts + mlp) + tile * BT + tl.arange(0, BT)
        inside = place < tl.load(ends + mlp)
        token = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        weight = mlp.to(tl.int64) * W + n
        ups = tl.zeros([BT, BN], tl.float32)
        gates = tl.zeros([BT, BN], tl.float32)
        for column in range(0, D, BK):
            k = column + tl.arange(0, BK)
            mine = tl.load(
                x + token[:, None] * x_stride + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0
            )
            at, mask = weight[None, :] * D + k[:, None], (n < W)[None, :] & (k < D)[:, None]
            ups = product(mine, tl.load(w_up + at, mask=mask, other=0.0), ups, PRECISION, WIDEN)
            if GATED:
                gates = product(mine, tl.load(w_gate + at, mask=mask, other=0.0), gates, PRECISION, WIDEN)
        if UP_BIAS:
            ups += tl.load(b_up + weight, mask=n < W, other=0.0).to(tl.float32)[None, :]
        at = place.to(tl.int64)[:, None] * W + n[None, :]
        mask = inside[:, None] & (n < W)[None, :]
        # Rounded as they are kept: the backward pass meets the same numbers.
        ups = ups.to(hidden.dtype.element_ty)
        if KEEP:
            tl.store(up + at, ups, mask=mask)
        if GATED:
            if GATE_BIAS:
                gates += tl.load(b_gate + weight, mask=n < W, other=0.0).to(tl.float32)[None, :]
            gates = gates.to(hidden.dtype.element_ty)
            if KEEP:
                tl.store(gate + at, gates, mask=mask)
            a = activate(gates.to(tl.float32), ACT) * ups.to(tl.float32)
        else:
            a = activate(ups.to(tl.float32), ACT)
        tl.store(hidden + at, a.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _down(
    hidden, order, starts, ends, tile_ends, w_down, b_down, y, E,
    W: tl.constexpr, O: tl.constexpr, G: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid [tiles that there can be, tiles of BN columns of O]."""
    mlp, tile = group_of(tl.program_id(0), tile_ends, E + 1, G)
    if mlp <= E:
        place = tl.load(starts + mlp) + tile * BT + tl.arange(0, BT)
        inside = place < tl.load(ends + mlp)
        token = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        total = tl.zeros([BT, BN], tl.float32)
        if mlp < E:
            weight = mlp.to(tl.int64) * O + n
            for column in range(0, W, BK):
                k = column + tl.arange(0, BK)
                a = tl.load(
                    hidden + place.to(tl.int64)[:, None] * W + k[None, :],
                    mask=inside[:, None] & (k < W)[None, :],
                    other=0.0,
                )
                rows = tl.load(
                    w_down + weight[None, :] * W + k[:, None], mask=(n < O)[None, :] & (k < W)[:, None], other=0.0
                )
                total = product(a, rows, total, PRECISION, WIDEN)
            if BIAS:
                total += tl.load(b_down + weight, mask=n < O, other=0.0).to(tl.float32)[None, :]
        tl.store(
            y + token[:, None] * O + n[None, :], total.to(y.dtype.element_ty), mask=inside[:, None] & (n < O)[None, :]
        )


@triton.jit
def _up_back(
    gradient, order, starts, ends, tile_ends, w_down, up, gate, of_up, of_gate, hidden, E,
    W: tl.constexpr, O: tl.constexpr, G: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid [tiles that there can be, tiles of BN columns of W]."""
    mlp, tile = group_of(tl.program_id(0), tile_ends, E, G)
    if mlp < E:
        place = tl.load(starts + mlp) + tile * BT + tl.arange(0, BT)
        inside = place < tl.load(ends + mlp)
        token = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        of_a = tl.zeros([BT, BN], tl.float32)
        for column in range(0, O, BK):
            k = column + tl.arange(0, BK)
            g = tl.load(gradient + token[:, None] * O + k[None, :], mask=inside[:, None] & (k < O)[None, :], other=0.0)
            rows = tl.load(
                w_down + (mlp.to(tl.int64) * O + k)[:, None] * W + n[None, :],
                mask=(k < O)[:, None] & (n < W)[None, :],
                other=0.0,
            )
            of_a = product(g, rows, of_a, PRECISION, WIDEN)
        at = place.to(tl.int64)[:, None] * W + n[None, :]
        mask = inside[:, None] & (n < W)[None, :]
        ups = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            gates = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
            act = activate(gates, ACT)
            tl.store(of_gate + at, (of_a * ups * slope(gates, ACT)).to(of_up.dtype.element_ty), mask=mask)
            tl.store(of_up + at, (of_a * act).to(of_up.dtype.element_ty), mask=mask)
            tl.store(hidden + at, (act * ups).to(of_up.dtype.element_ty), mask=mask)
        else:
            tl.store(of_up + at, (of_a * slope(ups, ACT)).to(of_up.dtype.element_ty), mask=mask)
            tl.store(hidden + at, activate(ups, ACT).to(of_up.dtype.element_ty), mask=mask)


@triton.jit
def _down_back(
    of_up, of_gate, order, starts, ends, tile_ends, w_up, w_gate, of_x, E,
    D: tl.constexpr, W: tl.constexpr, G: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid [tiles that there can be, tiles of BN columns of D]."""
    mlp, tile = group_of(tl.program_id(0), tile_ends, E + 1, G)
    if mlp <= E:
        place = tl.load(starts + mlp) + tile * BT + tl.arange(0, BT)
        inside = place < tl.load(ends + mlp)
        token = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        total = tl.zeros([BT, BN], tl.float32)
        if mlp < E:
            for column in range(0, W, BK):
                k = column + tl.arange(0, BK)
                at = place.to(tl.int64)[:, None] * W + k[None, :]
                mask = inside[:, None] & (k < W)[None, :]
                rows = (mlp.to(tl.int64) * W + k)[:, None] * D + n[None, :]
                real = (k < W)[:, None] & (n < D)[None, :]
                a = tl.load(of_up + at, mask=mask, other=0.0)
                total = product(a, tl.load(w_up + rows, mask=real, other=0.0), total, PRECISION, WIDEN)
                if GATED:
                    a = tl.load(of_gate + at, mask=mask, other=0.0)
                    total = product(a, tl.load(w_gate + rows, mask=real, other=0.0), total, PRECISION, WIDEN)
        tl.store(
            of_x + token[:, None] * D + n[None, :],
            total.to(of_x.dtype.element_ty),
            mask=inside[:, None] & (n < D)[None, :],
        )


@triton.jit
def _outer(
    left, right, order, starts, ends, of_weight, of_bias, left_stride, right_stride,
    M: tl.constexpr, N: tl.constexpr, LEFT_BY_ORDER: tl.constexpr, RIGHT_BY_ORDER: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid [E * tiles of BM columns of M, tiles of BN columns of N]: `of_weight [E, M, N]`, `of_bias [E, M]`."""
    TILES: tl.constexpr = (M + BM - 1) // BM
    mlp = tl.program_id(0) // TILES
    m = tl.program_id(0) % TILES * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    bias = tl.zeros([BM], tl.float32)
    start = tl.load(starts + mlp)
    end = tl.load(ends + mlp)
    for first in range(start, end, BT):
        place = first + tl.arange(0, BT)
        inside = place < end
        place64 = place.to(tl.int64)
        token = place64
        if LEFT_BY_ORDER or RIGHT_BY_ORDER:
            token = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        row = token if LEFT_BY_ORDER else place64
        a = tl.load(left + row[:, None] * left_stride + m[None, :], mask=inside[:, None] & (m < M)[None, :], other=0.0)
        bias += tl.sum(a.to(tl.float32), 0)
        if WEIGHT:
            row = token if RIGHT_BY_ORDER else place64
            b = tl.load(
                right + row[:, None] * right_stride + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0
            )
            total = product(tl.trans(a), b, total, PRECISION, WIDEN)
    at = mlp.to(tl.int64) * M + m
    if WEIGHT:
        tl.store(
            of_weight + at[:, None] * N + n[None, :],
            total.to(of_weight.dtype.element_ty),
            mask=(m < M)[:, None] & (n < N)[None, :],
        )
    if BIAS and tl.program_id(1) == 0:
        tl.store(of_bias + at, bias.to(of_bias.dtype.element_ty), mask=m < M)


def _tiles(sort: Sorted, inner: int, columns: int, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid of a product, and what its kernel is told beside its own."""
    tokens, groups = sort.order.shape[1], sort.ends.shape[1]
    step = 32 if dtype == torch.float32 else 64
    tile = min(power_of_two(columns, 16), step)
    return (tiles_at_most(tokens, groups, TILE), ceil_div(columns, tile)), {
        "G": power_of_two(groups), "PRECISION": precision(), "WIDEN": widens(dtype), "BT": TILE,
        "BK": min(power_of_two(inner, 16), step), "BN": tile, "num_warps": 4, "num_stages": 3, **FUSED,
    }  # fmt: skip


def _given(tensor: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """A kernel takes no None: what it is told not to read may be anything."""
    return instead if tensor is None else tensor


def forward(
    x: torch.Tensor, sort: Sorted,
    w_up: torch.Tensor, b_up: torch.Tensor | None, w_down: torch.Tensor, b_down: torch.Tensor | None,
    w_gate: torch.Tensor | None, b_gate: torch.Tensor | None, act: str,
    y: torch.Tensor, up: torch.Tensor | None, gate: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills `y [T, O]` and, where given, `up` and `gate [T, W]` in sorted order. `sort` is by MLP, `E + 1` of them."""
    mlps, width, d_model = w_up.shape
    d_out = w_down.shape[1]
    hidden = x.new_empty(len(x), width)
    grid, common = _tiles(sort, d_model, width, x.dtype)
    _up[grid](
        x, *sort, w_up, _given(b_up, x), _given(w_gate, x), _given(b_gate, x),
        _given(up, x), _given(gate, x), hidden, x.stride(0), mlps,
        D=d_model, W=width, ACT=act, UP_BIAS=b_up is not None, GATED=w_gate is not None,
        GATE_BIAS=b_gate is not None, KEEP=up is not None, **common,
    )  # fmt: skip
    grid, common = _tiles(sort, width, d_out, x.dtype)
    _down[grid](hidden, *sort, w_down, _given(b_down, x), y, mlps, W=width, O=d_out, BIAS=b_down is not None, **common)


def backward(
    gradient: torch.Tensor, x: torch.Tensor, sort: Sorted,
    w_up: torch.Tensor, w_down: torch.Tensor, w_gate: torch.Tensor | None, act: str,
    up: torch.Tensor, gate: torch.Tensor, results: tuple[torch.Tensor | None, ...],
) -> None:  # fmt: skip
    """Fills what is given of the gradients of x, w_up, b_up, w_down, b_down, w_gate and b_gate."""
    of_x, of_w_up, of_b_up, of_w_down, of_b_down, of_w_gate, of_b_gate = results
    mlps, width, d_model = w_up.shape
    d_out, gated = w_down.shape[1], w_gate is not None
    hidden, of_up = torch.empty_like(up), torch.empty_like(up)
    of_gate = torch.empty_like(up) if gated else up
    grid, common = _tiles(sort, d_out, width, x.dtype)
    _up_back[grid](
        gradient, *sort, w_down, up, gate, of_up, of_gate, hidden, mlps, W=width, O=d_out, ACT=act, GATED=gated,
        **common,
    )  # fmt: skip
    if of_x is not None:
        grid, common = _tiles(sort, width, d_model, x.dtype)
        _down_back[grid](
            of_up, of_gate, *sort, w_up, _given(w_gate, x), of_x, mlps, D=d_model, W=width, GATED=gated, **common
        )
    _outer_of(of_up, x, sort, mlps, of_w_up, of_b_up, right_by_order=True)
    _outer_of(of_gate, x, sort, mlps, of_w_gate, of_b_gate, right_by_order=True)
    _outer_of(gradient, hidden, sort, mlps, of_w_down, of_b_down, left_by_order=True)


def _outer_of(
    left: torch.Tensor, right: torch.Tensor, sort: Sorted, mlps: int,
    of_weight: torch.Tensor | None, of_bias: torch.Tensor | None,
    *, left_by_order: bool = False, right_by_order: bool = False,
) -> None:  # fmt: skip
    if of_weight is None and of_bias is None:
        return
    rows, columns = left.shape[1], 1 if of_weight is None else right.shape[1]
    narrow = left.dtype != torch.float32
    row_tile, column_tile = (min(power_of_two(n, 16), 64) for n in (rows, columns))
    _outer[(mlps * ceil_div(rows, row_tile), ceil_div(columns, column_tile))](
        left, right, sort.order, sort.starts, sort.ends, _given(of_weight, left), _given(of_bias, left),
        left.stride(0), right.stride(0), M=rows, N=columns, LEFT_BY_ORDER=left_by_order,
        RIGHT_BY_ORDER=right_by_order, WEIGHT=of_weight is not None, BIAS=of_bias is not None,
        PRECISION=precision(), WIDEN=widens(left.dtype), BT=64 if narrow else 32, BM=row_tile, BN=column_tile,
        num_warps=4 if narrow else 8, num_stages=3, **FUSED,
    )  # fmt: skip
