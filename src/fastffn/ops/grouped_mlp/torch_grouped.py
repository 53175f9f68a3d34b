"""`grouped_mlp` from plain torch operators: tokens sorted by MLP, each segment multiplied with its weights.

Shapes: up, gate: [T, W] in sorted order; segment e is the rows from ends[e - 1] to ends[e]; rows after the last end
belong to no MLP. Every sum over the tokens of an MLP is one product over its segment: its order is fixed.

Two ways to go through the segments, chosen by `_at_once`:

- one MLP after the other, each with all its steps: what it fetches and gives back stays in the cache. Measured on a
  CPU (float32, D = O = 768, W = 8): 4096 tokens through 16 MLPs in 5.5 ms, all at once in 22 ms, most of them page
  faults of three arrays as large as the input.
- all at once with `torch.nn.functional.grouped_mm`, which needs no lengths in Python, so that a device need not be
  waited for, and no calls for each MLP: 512 tokens through 128 MLPs in 1.1 ms, one after the other in 3.2 ms. It takes
  rows whose length is a multiple of 16 bytes, and no float64. torch 2.9 does not have it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from fastffn.ops.activations import get_activation, get_activation_backward
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.grouped_mlp.reference import sorted_by_mlp

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16) if hasattr(F, "grouped_mm") else ()
# Bytes of rows fetched and given back, for each MLP on average, from which the calls for each MLP are worth it: more
# are less likely to stay in the cache, and cost more page faults, than what some 15 microseconds a call cost.
_WORTH_CALLS = 48 * 1024
# Tokens of an MLP that the forward pass takes in one piece.
_PIECE = 512


def _at_once(x: torch.Tensor, ends: torch.Tensor, width: int, d_out: int) -> bool:
    tokens, d_model = x.shape
    unit = 16 // x.element_size()
    if not tokens or x.dtype not in _GROUPED_DTYPES or any(n % unit for n in (d_model, width, d_out)):
        return False
    on_host = ends.device.type == "cpu"
    moved = tokens * (2 * d_model + d_out) * x.element_size()
    return not on_host or (tokens > 4 and moved < _WORTH_CALLS * len(ends))


def _segments(ends: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """`(e, start, stop)` of each MLP."""
    start = 0
    for e, stop in enumerate(ends.tolist()):
        yield e, start, stop
        start = stop


def _linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, e: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    if bias is None:
        return torch.mm(rows, weight[e].T, out=out)
    return torch.addmm(bias[e], rows, weight[e].T, out=out)


def _forward(
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    *,
    keep: bool,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    tokens, (mlps, width, _), d_out = x.shape[0], up_weight.shape, down_weight.shape[1]
    act = get_activation(activation)
    order, ends, _ = sorted_by_mlp(index, mlps)
    y = x.new_empty(tokens, d_out) if out is None else out
    if _at_once(x, ends, width, d_out):
        products = _Products(ends, tokens)
        xs = x.index_select(0, order)
        up = products.linear(xs, up_weight, up_bias)
        gate = None if gate_weight is None else products.linear(xs, gate_weight, gate_bias)
        del xs
        ys = products.linear(act(up) if gate is None else act(gate) * up, down_weight, down_bias)
        y.index_copy_(0, order, products.without_strays(ys))
        return (y, order, ends, up, x.new_empty(0) if gate is None else gate) if keep else (y,)

    up = x.new_empty(tokens if keep else 0, width)
    gate = x.new_empty(tokens, width) if keep and gate_weight is not None else x.new_empty(0)
    stop = 0
    for e, first, stop in _segments(ends):
        for start in range(first, stop, _PIECE):
            piece = slice(start, min(start + _PIECE, stop))
            own = order[piece]
            xs = x.index_select(0, own)
            hidden = _linear(xs, up_weight, up_bias, e, up[piece] if keep else None)
            if gate_weight is None:
                hidden = act(hidden)
            else:
                hidden = act(_linear(xs, gate_weight, gate_bias, e, gate[piece] if keep else None)) * hidden
            y.index_copy_(0, own, _linear(hidden, down_weight, down_bias, e))
    if stop < tokens:
        y[order[stop:]] = 0
    return (y, order, ends, up, gate) if keep else (y,)


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    order: torch.Tensor,
    ends: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    *,
    needs: tuple[bool, ...],
) -> Tensors:
    weights = (up_weight, down_weight, gate_weight)
    if _at_once(x, ends, up_weight.shape[1], down_weight.shape[1]):
        return _backward_at_once(gradient, x, weights, activation, order, ends, up, gate, needs)
    act, act_backward = get_activation(activation), get_activation_backward(activation)
    inputs = (x, None, up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)
    results = [
        x.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip(inputs, needs, strict=True)
    ]
    of_x, _, of_up_weight, of_up_bias, of_down_weight, of_down_bias, of_gate_weight, of_gate_bias = results
    stop = 0
    for e, start, stop in _segments(ends):
        if start == stop:
            for result in results[2:]:
                if result is not None:
                    result[e] = 0
            continue
        own = order[start:stop]
        own_up, own_gate = up[start:stop], gate[start:stop]
        of_y = gradient.index_select(0, own)
        if of_down_bias is not None:
            torch.sum(of_y, 0, out=of_down_bias[e])
        if of_down_weight is not None:
            hidden = act(own_up) if gate_weight is None else act(own_gate) * own_up
            torch.mm(of_y.T, hidden, out=of_down_weight[e])
        of_hidden = of_y @ down_weight[e]
        del of_y
        if gate_weight is None:
            of_up, of_gate = act_backward(of_hidden, own_up), None
        else:
            of_up, of_gate = of_hidden * act(own_gate), act_backward(of_hidden * own_up, own_gate)
        xs = x.index_select(0, own) if of_up_weight is not None or of_gate_weight is not None else None
        for of, of_weight, of_bias in ((of_up, of_up_weight, of_up_bias), (of_gate, of_gate_weight, of_gate_bias)):
            if of is not None and xs is not None and of_weight is not None:
                torch.mm(of.T, xs, out=of_weight[e])
            if of is not None and of_bias is not None:
                torch.sum(of, 0, out=of_bias[e])
        del xs
        if of_x is not None:
            of_xs = of_up @ up_weight[e]
            if gate_weight is not None and of_gate is not None:
                of_xs.addmm_(of_gate, gate_weight[e])
            of_x.index_copy_(0, own, of_xs)
    if of_x is not None and stop < x.shape[0]:
        of_x[order[stop:]] = 0
    return tuple(results)


class _Products:
    """Products over all segments in one call each.

    Args:
        ends: `[E]`, where each segment ends.
        tokens: T, number of rows.
    """

    def __init__(self, ends: torch.Tensor, tokens: int) -> None:
        self.ends, self.tokens = ends, tokens

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`rows [T, in]` of segment e times `weight[e]`, transposed, `[out, in]`: `[T, out]`."""
        result = F.grouped_mm(rows, weight.contiguous().transpose(1, 2), offs=self.ends)
        if bias is not None:
            numbers = torch.arange(self.tokens, device=self.ends.device, dtype=torch.int32)
            mlp = torch.searchsorted(self.ends, numbers, right=True).clamp_max_(len(self.ends) - 1)
            result += bias.index_select(0, mlp)
        return result

    def linear_back(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`rows [T, out]` of segment e times `weight[e] [out, in]`: `[T, in]`."""
        return F.grouped_mm(rows, weight.contiguous(), offs=self.ends)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left[segment].T @ right[segment]` of `[T, m]` and `[T, n]` for each segment: `[E, m, n]`."""
        return F.grouped_mm(left.T, right, offs=self.ends).contiguous()

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of the rows of each segment: `[T, m]` to `[E, m]`."""
        # As wide as the alignment asks; the columns are all the same.
        ones = rows.new_ones(self.tokens, 16 // rows.element_size())
        return F.grouped_mm(rows.T, ones, offs=self.ends)[:, :, 0].contiguous()

    def without_strays(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows`, changed in place: zero where they belong to no MLP."""
        stray = torch.arange(self.tokens, device=rows.device) >= self.ends[-1]
        return rows.masked_fill_(stray.unsqueeze(1), 0)


def _backward_at_once(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    activation: str,
    order: torch.Tensor,
    ends: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    act, act_backward = get_activation(activation), get_activation_backward(activation)
    up_weight, down_weight, gate_weight = weights
    need_x, _, need_up, need_up_bias, need_down, need_down_bias, need_gate, need_gate_bias = needs
    products = _Products(ends, x.shape[0])
    of_y = gradient.index_select(0, order)
    of_down_bias = products.sum(of_y) if need_down_bias else None
    of_down = None
    if need_down:
        of_down = products.product(of_y, act(up) if gate_weight is None else act(gate) * up)
    of_hidden = products.linear_back(of_y, down_weight)
    del of_y
    of_gate = None
    if gate_weight is None:
        of_up = act_backward(of_hidden, up)
    else:
        of_gate = act_backward(of_hidden * up, gate)
        of_up = of_hidden * act(gate)
    del of_hidden
    xs = x.index_select(0, order) if need_up or need_gate else None
    of_up_weight = products.product(of_up, xs) if need_up and xs is not None else None
    of_gate_weight = products.product(of_gate, xs) if need_gate and of_gate is not None and xs is not None else None
    del xs
    of_x = None
    if need_x:
        of_xs = products.linear_back(of_up, up_weight)
        if of_gate is not None and gate_weight is not None:
            of_xs += products.linear_back(of_gate, gate_weight)
        of_x = torch.empty_like(of_xs).index_copy_(0, order, products.without_strays(of_xs))
    return (
        of_x,
        None,
        of_up_weight,
        products.sum(of_up) if need_up_bias else None,
        of_down,
        of_down_bias,
        of_gate_weight,
        products.sum(of_gate) if need_gate_bias and of_gate is not None else None,
    )


IMPL = Impl(name="torch_grouped", forward=_forward, backward=_backward)
