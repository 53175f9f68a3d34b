"""The definition of `grouped_mlp_int8`: `grouped_mlp` of the weights that the int8 rows stand for, in plain torch.

Sums are kept in float32 at least, the result is rounded once.

Implementations take x `[T, D]`, index `[T]`, then weight, scale and bias of `up`, `down` and `gate`, and the name of
the activation; see `grouped_mlp_int8`.
"""

from __future__ import annotations

from typing import Any

import torch

from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.grouped_mlp.reference import definition
from fastffn.ops.int8 import dequantize_rows


def floats_of(maps: Tensors, dtype: torch.dtype) -> tuple[Any, ...]:
    """`(up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)` in a dtype, out of the nine of int8."""
    found: list[torch.Tensor | None] = []
    for weight, scale, bias in (maps[0:3], maps[3:6], maps[6:9]):
        found += [
            None if weight is None or scale is None else dequantize_rows(weight, scale.to(dtype)),
            None if bias is None else bias.to(dtype),
        ]
    return tuple(found)


def forward(
    x: torch.Tensor, index: torch.Tensor, *given: Any, keep: bool, out: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """`y [T, O]`."""
    *maps, activation = given
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    up, up_bias, down, down_bias, gate, gate_bias = floats_of(tuple(maps), dtype)
    y = definition(x.to(dtype), index, up, up_bias, down, down_bias, gate, gate_bias, activation).to(x.dtype)
    return (y if out is None else out.copy_(y),)


IMPL = Impl(name="reference", forward=forward)
