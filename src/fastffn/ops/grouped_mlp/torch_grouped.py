"""`grouped_mlp` from plain torch operators: tokens sorted by MLP, each segment multiplied with its weights.

Shapes: xs, up, gate: [T, ...] in sorted order; segment e is the rows from ends[e - 1] to ends[e]; rows after the last
end belong to no MLP. Every sum over the tokens of an MLP is one product over its segment: its order is fixed.

Two ways to multiply segments. `torch.nn.functional.grouped_mm` does all of them in one call and needs no lengths in
Python, so a device need not be waited for; it takes rows whose length is a multiple of 16 bytes, and no float64.
Otherwise a loop over the segments that are not empty.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastffn.ops.activations import get_activation, get_activation_backward
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.grouped_mlp.reference import sorted_by_mlp

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Segments:
    """The rows of each MLP in tokens sorted by MLP, and products over them.

    Args:
        ends: `[E]`, where each segment ends.
        tokens: T, number of rows.
        like: a tensor of the dtype and device of the factors.
        widths: row lengths of all factors.
    """

    def __init__(self, ends: torch.Tensor, tokens: int, like: torch.Tensor, widths: tuple[int, ...]) -> None:
        self.ends, self.tokens = ends, tokens
        unit = 16 // like.element_size()
        self.in_one_call = tokens > 0 and like.dtype in _GROUPED_DTYPES and all(width % unit == 0 for width in widths)
        self.parts: list[tuple[int, slice]] = []
        self.used = tokens
        if not self.in_one_call or ends.device.type == "cpu":
            start = 0
            for e, stop in enumerate(ends.tolist()):
                if stop > start:
                    self.parts.append((e, slice(start, stop)))
                start = stop
            self.used = start

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`rows [T, in]` of segment e times `weight[e]`, transposed, `[out, in]`: `[T, out]`."""
        if self.in_one_call:
            result = F.grouped_mm(rows, weight.transpose(1, 2), offs=self.ends)
            if bias is not None:
                result += self._of_each_row(bias)
            return result
        result = rows.new_empty(self.tokens, weight.shape[1])
        for e, part in self.parts:
            if bias is None:
                torch.mm(rows[part], weight[e].T, out=result[part])
            else:
                torch.addmm(bias[e], rows[part], weight[e].T, out=result[part])
        return result

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left[segment].T @ right[segment]` of `[T, m]` and `[T, n]` for each segment: `[E, m, n]`."""
        if self.in_one_call:
            return F.grouped_mm(left.T, right, offs=self.ends).contiguous()
        result = left.new_zeros(len(self.ends), left.shape[1], right.shape[1])
        for e, part in self.parts:
            torch.mm(left[part].T, right[part], out=result[e])
        return result

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of the rows of each segment: `[T, m]` to `[E, m]`."""
        if self.in_one_call:
            # As wide as the alignment asks; the columns are all the same.
            ones = rows.new_ones(self.tokens, 16 // rows.element_size())
            return F.grouped_mm(rows.T, ones, offs=self.ends)[:, :, 0].contiguous()
        result = rows.new_zeros(len(self.ends), rows.shape[1])
        for e, part in self.parts:
            torch.sum(rows[part], 0, out=result[e])
        return result

    def without_strays(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows`, zero where they belong to no MLP; changed in place."""
        if self.used < self.tokens:
            rows[self.used :] = 0
        elif self.in_one_call and not self.parts and self.tokens:
            rows.masked_fill_((torch.arange(self.tokens, device=rows.device) >= self.ends[-1]).unsqueeze(1), 0)
        return rows

    def _of_each_row(self, table: torch.Tensor) -> torch.Tensor:
        numbers = torch.arange(self.tokens, device=self.ends.device, dtype=torch.int32)
        mlp = torch.searchsorted(self.ends, numbers, right=True).clamp_max_(len(self.ends) - 1)
        return table.index_select(0, mlp)


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
    mlps, width, d_model = up_weight.shape
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    gate_weight = None if gate_weight is None else gate_weight.contiguous()
    act = get_activation(activation)
    order, ends, _ = sorted_by_mlp(index, mlps)
    segments = Segments(ends, x.shape[0], x, (d_model, width, down_weight.shape[1]))
    xs = x.index_select(0, order)
    up = segments.linear(xs, up_weight, up_bias)
    gate = None if gate_weight is None else segments.linear(xs, gate_weight, gate_bias)
    del xs
    hidden = act(up) if gate is None else act(gate) * up
    ys = segments.without_strays(segments.linear(hidden, down_weight, down_bias))
    y = ys.new_empty(ys.shape) if out is None else out
    y.index_copy_(0, order, ys)
    if not keep:
        return (y,)
    return y, order, ends, up, x.new_empty(0) if gate is None else gate


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
    _, width, d_model = up_weight.shape
    up_weight, down_weight = up_weight.contiguous(), down_weight.contiguous()
    gate_weight = None if gate_weight is None else gate_weight.contiguous()
    act, act_backward = get_activation(activation), get_activation_backward(activation)
    segments = Segments(ends, x.shape[0], x, (d_model, width, down_weight.shape[1]))
    of_y = gradient.index_select(0, order)
    need_x, _, need_up, need_up_bias, need_down, need_down_bias, need_gate, need_gate_bias = needs

    of_down_bias = segments.sum(of_y) if need_down_bias else None
    of_down = None
    if need_down:
        of_down = segments.product(of_y, act(up) if gate_weight is None else act(gate) * up)
    of_hidden = segments.linear(of_y, down_weight.transpose(1, 2), None)
    del of_y
    of_gate = None
    if gate_weight is None:
        of_up = act_backward(of_hidden, up)
    else:
        of_gate = act_backward(of_hidden * up, gate)
        of_up = of_hidden * act(gate)
    del of_hidden

    xs = x.index_select(0, order) if need_up or need_gate else None
    of_up_weight = segments.product(of_up, xs) if need_up and xs is not None else None
    of_gate_weight = segments.product(of_gate, xs) if need_gate and of_gate is not None and xs is not None else None
    del xs
    of_x = None
    if need_x:
        of_xs = segments.linear(of_up, up_weight.transpose(1, 2), None)
        if of_gate is not None and gate_weight is not None:
            of_xs += segments.linear(of_gate, gate_weight.transpose(1, 2), None)
        of_x = torch.empty_like(of_xs).index_copy_(0, order, segments.without_strays(of_xs))
    return (
        of_x,
        None,
        of_up_weight,
        segments.sum(of_up) if need_up_bias else None,
        of_down,
        of_down_bias,
        of_gate_weight,
        segments.sum(of_gate) if need_gate_bias and of_gate is not None else None,
    )


IMPL = Impl(name="torch_grouped", forward=_forward, backward=_backward)
