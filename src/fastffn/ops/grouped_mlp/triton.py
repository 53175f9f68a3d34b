"""`grouped_mlp` by Triton kernels (`triton_products`), on any device that Triton drives, which is not waited for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from fastffn.ops import triton
from fastffn.ops.activations import plain_name
from fastffn.ops.cpu import rows
from fastffn.ops.dispatch import Impl, Tensors

if TYPE_CHECKING:
    from fastffn.ops.grouped_mlp.op import Request


def _kernels() -> tuple[Any, Any]:
    """The files of kernels: they import Triton."""
    return (
        importlib.import_module("fastffn.ops.triton_sort"),
        importlib.import_module("fastffn.ops.grouped_mlp.triton_products"),
    )


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _sorted(index: torch.Tensor, mlps: int) -> Any:
    """The tokens by MLP; those of none are one MLP more."""
    sort, products = _kernels()
    index = index.long()
    keys = torch.where((index >= 0) & (index < mlps), index, mlps).int()
    return sort.sort_by_group(keys.unsqueeze(0), mlps + 1, products.TILE)


def forward(
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
    """See `reference.py`."""
    x = rows(x)
    weights = [_contiguous(t) for t in (up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)]
    tokens, (mlps, width, _) = len(x), up_weight.shape
    y = x.new_empty(tokens, down_weight.shape[1]) if out is None else out
    up = x.new_empty(tokens, width) if keep else None
    gate = None if gate_weight is None or not keep else x.new_empty(tokens, width)
    order, ends = x.new_empty(tokens, dtype=torch.int64), x.new_zeros(mlps, dtype=torch.int32)
    if tokens:
        filled = y.contiguous()  # kernels write rows side by side
        with triton.on_device_of(x):
            sort = _sorted(index, mlps)
            _kernels()[1].forward(x, sort, *weights, plain_name(activation), filled, up, gate)
        order, ends = sort.order[0].long(), sort.ends[0, :mlps]
        if filled is not y:
            y.copy_(filled)
    return (y,) if up is None else (y, order, ends.contiguous(), up, x.new_empty(0) if gate is None else gate)


def backward(
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
    """See `reference.py`. Every gradient's memory is written exactly once."""
    x = rows(x)
    inputs = (x, None, up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)
    gradients = tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip(inputs, needs, strict=True)
    )
    if not len(x):
        return tuple(None if tensor is None else tensor.zero_() for tensor in gradients)
    sort_file, products = _kernels()
    with triton.on_device_of(x):
        products.backward(
            gradient,
            x,
            sort_file.from_ends(order, ends, products.TILE),
            up_weight.contiguous(),
            down_weight.contiguous(),
            _contiguous(gate_weight),
            plain_name(activation),
            up.contiguous(),
            gate.contiguous(),
            (gradients[0], *gradients[2:]),
        )
    return gradients


def _refuses(request: Request) -> str | None:
    return triton.refuses(request.device, request.dtype)


def _yields(request: Request) -> str | None:
    return triton.yields()


IMPL = Impl(name="triton", forward=forward, backward=backward, refuses=_refuses, yields=_yields)
