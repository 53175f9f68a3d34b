"""`neuron_tree_int8` by the compiled kernels of csrc/neuron_tree.cpp: int8 rows are widened as they are read."""

from __future__ import annotations

import torch

from fastffn.ops import cpu
from fastffn.ops.dispatch import Impl
from fastffn.ops.neuron_tree.request import Request, depth_of


def forward(
    x: torch.Tensor,
    w_in: torch.Tensor,
    in_scale: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    out_scale: torch.Tensor,
    activation: str,
    *,
    keep: bool,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """See `reference.py`."""
    module, isa = cpu.compiled()
    x, w_in, w_out = cpu.rows(x), w_in.contiguous(), w_out.contiguous()
    in_scale, out_scale = in_scale.contiguous(), out_scale.contiguous()
    b_in = None if b_in is None else b_in.contiguous()
    tokens, d_model = x.shape
    trees, neurons, d_out = w_out.shape
    y = x.new_empty(tokens, d_out) if out is None else out
    module.tree_forward(
        isa,
        cpu.DTYPES[x.dtype],
        cpu.activation_number(activation),
        x.data_ptr(),
        w_in.data_ptr(),
        cpu.address(b_in),
        w_out.data_ptr(),
        in_scale.data_ptr(),
        out_scale.data_ptr(),
        y.data_ptr(),
        0,
        0,
        tokens,
        trees,
        depth_of(neurons) + 1,
        d_model,
        d_out,
        x.stride(0),
        torch.get_num_threads(),
    )
    return (y,)


def _refuses(request: Request) -> str | None:
    return cpu.refuses(request.device, request.dtype, request.tokens)


IMPL = Impl(name="cpu", forward=forward, refuses=_refuses)
