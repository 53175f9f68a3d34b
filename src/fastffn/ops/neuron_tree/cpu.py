"""`neuron_tree` by the compiled kernels of csrc/neuron_tree.cpp: each token evaluates its path and nothing else."""

from __future__ import annotations

from functools import partial

import torch

from fastffn.ops import cpu
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.neuron_tree.request import Request, depth_of
from fastffn.ops.neuron_tree.routes import why_not


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
    """See `reference.py`."""
    module, isa = cpu.compiled()
    x, w_in, w_out = cpu.rows(x), w_in.contiguous(), w_out.contiguous()
    b_in = None if b_in is None else b_in.contiguous()
    tokens, d_model = x.shape
    trees, neurons, d_out = w_out.shape
    levels = depth_of(neurons) + 1
    y = x.new_empty(tokens, d_out) if out is None else out
    scores = last = None
    if keep:
        scores = x.new_empty(trees, tokens, levels, dtype=torch.float32)
        last = x.new_empty(trees, tokens, dtype=torch.int64)
    module.tree_forward(
        isa,
        cpu.DTYPES[x.dtype],
        cpu.activation_number(activation),
        x.data_ptr(),
        w_in.data_ptr(),
        cpu.address(b_in),
        w_out.data_ptr(),
        0,
        0,
        y.data_ptr(),
        cpu.address(scores),
        cpu.address(last),
        tokens,
        trees,
        levels,
        d_model,
        d_out,
        x.stride(0),
        torch.get_num_threads(),
    )
    return (y,) if scores is None or last is None else (y, scores, last)


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
    """See `reference.backward`. Every gradient's memory is written exactly once."""
    module, isa = cpu.compiled()
    x, w_in, w_out = cpu.rows(x), w_in.contiguous(), w_out.contiguous()
    tokens, d_model = x.shape
    trees, neurons, d_out = w_out.shape
    gradients = tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip((x, w_in, b_in, w_out), needs, strict=True)
    )
    module.tree_backward(
        isa,
        cpu.DTYPES[x.dtype],
        cpu.activation_number(activation),
        straight_through,
        gradient.data_ptr(),
        x.data_ptr(),
        w_in.data_ptr(),
        w_out.data_ptr(),
        scores.data_ptr(),
        last.data_ptr(),
        *map(cpu.address, gradients),
        tokens,
        trees,
        depth_of(neurons) + 1,
        d_model,
        d_out,
        x.stride(0),
        torch.get_num_threads(),
    )
    return gradients


def _refuses(request: Request) -> str | None:
    return cpu.refuses(request.device, request.dtype, request.tokens)


IMPL = Impl(
    name="cpu",
    forward=forward,
    backward=backward,
    refuses=_refuses,
    yields=partial(why_not, "cpu"),
    yields_backward=partial(why_not, "cpu", backward=True),
)
