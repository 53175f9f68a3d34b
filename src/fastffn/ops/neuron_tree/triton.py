"""`neuron_tree` by Triton kernels, on any device that Triton drives: `triton_path` or `triton_levels`, by `routes`.

Nothing waits for the device and no size depends on what is in a tensor: calls can be captured in a graph. Each sum has
a fixed order, without atomics: the same bits from run to run.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastffn.ops import triton
from fastffn.ops.activations import plain_name
from fastffn.ops.cpu import rows
from fastffn.ops.dispatch import Impl, Tensors
from fastffn.ops.neuron_tree.request import Request, depth_of
from fastffn.ops.neuron_tree.routes import kernel_for, why_not


def _kernels(name: str) -> Any:
    """A file of kernels: it imports Triton."""
    return importlib.import_module(f"fastffn.ops.neuron_tree.triton_{name}")


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
    """See `reference.neuron_tree`."""
    x, w_in, w_out = rows(x), w_in.contiguous(), w_out.contiguous()
    b_in = None if b_in is None else b_in.contiguous()
    tokens, d_model = x.shape
    trees, neurons, d_out = w_out.shape
    levels = depth_of(neurons) + 1
    y = x.new_empty(tokens, d_out) if out is None else out
    scores = last = None
    if keep:
        scores = x.new_empty(trees, tokens, levels, dtype=torch.float32)
        last = x.new_empty(trees, tokens, dtype=torch.int64)
    if tokens:
        with triton.on_device_of(x):
            kernels = _kernels(kernel_for(tokens, trees, levels, d_model + d_out))
            kernels.forward(x, w_in, b_in, w_out, levels, plain_name(activation), y, scores, last)
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
    x, w_in, w_out = rows(x), w_in.contiguous(), w_out.contiguous()
    scores, last = scores.contiguous(), last.contiguous()
    tokens, d_model = x.shape
    trees, neurons, d_out = w_out.shape
    levels, act = depth_of(neurons) + 1, plain_name(activation)
    d_x, d_w_in, d_b_in, d_w_out = gradients = tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip((x, w_in, b_in, w_out), needs, strict=True)
    )
    if not tokens:
        return tuple(None if tensor is None else tensor.zero_() for tensor in gradients)
    kernel, weights, sorting = kernel_for(tokens, trees, levels, d_model + d_out), _kernels("weights"), None
    levelled = kernel == "levels"
    cut = _kernels("levels").cut_of(levels) if levelled else max(0, levels - weights.LOWER_LEVELS)
    with triton.on_device_of(x):
        if levelled or d_w_in is not None or d_b_in is not None or d_w_out is not None:
            sort = importlib.import_module("fastffn.ops.triton_sort")
            keys = ((last + 1) >> (levels - 1 - cut)) - 2**cut
            tile = _kernels("levels").TILE
            sorting = sort.sort_by_group(keys.int(), 2**cut, tile)
        if levelled or d_x is not None or d_w_in is not None or d_b_in is not None:
            given = (gradient, x, w_in, w_out, levels, act, straight_through, scores, last)
            d_scores = _kernels(kernel).backward(*given, *((sorting,) if levelled else ()), d_x)
        if d_w_in is not None or d_b_in is not None:
            weights.gradients(d_scores, x, last, sorting, levels, cut, "linear", d_w_in, d_b_in)
        if d_w_out is not None:
            weights.gradients(scores, gradient, last, sorting, levels, cut, act, d_w_out, None)
    return d_x, d_w_in, d_b_in, d_w_out


def _refuses(request: Request) -> str | None:
    return triton.refuses(request.device, request.dtype)


def _yields(request: Request) -> str | None:
    return triton.yields() or why_not("triton", request)


IMPL = Impl(name="triton", forward=forward, backward=backward, refuses=_refuses, yields=_yields)
