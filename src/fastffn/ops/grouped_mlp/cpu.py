"""`grouped_mlp` by the compiled kernels of csrc/grouped_mlp.cpp: the tokens of each MLP together, no copies of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastffn.ops import cpu
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.grouped_mlp.routes import why_not

if TYPE_CHECKING:
    from fastffn.ops.grouped_mlp.op import Request


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


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
    scales: Tensors = (None, None, None),
    keep: bool,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """See `reference.py`; `scales`, of `up`, `down` and `gate`, come with int8 weights."""
    module, isa = cpu.compiled()
    x, index = cpu.rows(x), index.long().contiguous()
    # Named, so that what is a copy lives until the kernel is done.
    weights = [_contiguous(t) for t in (up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias, *scales)]
    tokens, d_model = x.shape
    mlps, width, _ = up_weight.shape
    d_out = down_weight.shape[1]
    y = x.new_empty(tokens, d_out) if out is None else out
    # The kernel writes rows side by side.
    filled = y.contiguous()
    saved: tuple[torch.Tensor, ...] = ()
    if keep:
        saved = (
            x.new_empty(tokens, dtype=torch.int64),
            x.new_empty(mlps, dtype=torch.int32),
            x.new_empty(tokens, width),
            x.new_empty(0) if gate_weight is None else x.new_empty(tokens, width),
        )
    module.mlp_forward(
        isa,
        cpu.DTYPES[x.dtype],
        cpu.activation_number(activation),
        x.data_ptr(),
        index.data_ptr(),
        *map(cpu.address, weights),
        filled.data_ptr(),
        *(map(cpu.address, saved) if keep else (0, 0, 0, 0)),
        tokens,
        mlps,
        d_model,
        width,
        d_out,
        x.stride(0),
        torch.get_num_threads(),
    )
    if filled is not y:
        y.copy_(filled)
    return (y, *saved)


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
    module, isa = cpu.compiled()
    x = cpu.rows(x)
    inputs = (x, None, up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)
    gradients = tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip(inputs, needs, strict=True)
    )
    read = [_contiguous(t) for t in (up_weight, down_weight, gate_weight, order, ends, up, gate)]
    tokens, d_model = x.shape
    mlps, width, _ = up_weight.shape
    module.mlp_backward(
        isa,
        cpu.DTYPES[x.dtype],
        cpu.activation_number(activation),
        gradient.data_ptr(),
        x.data_ptr(),
        *map(cpu.address, read),
        *map(cpu.address, gradients[:1] + gradients[2:]),
        tokens,
        mlps,
        d_model,
        width,
        down_weight.shape[1],
        x.stride(0),
        torch.get_num_threads(),
    )
    return gradients


def _refuses(request: Request) -> str | None:
    return cpu.refuses(request.device, request.dtype, request.tokens)


IMPL = Impl(name="cpu", forward=forward, backward=backward, refuses=_refuses, yields=why_not)
