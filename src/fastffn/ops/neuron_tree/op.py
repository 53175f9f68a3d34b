"""The public function `neuron_tree`: checks, and the operator behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from fastffn.errors import BackendError, DeviceError, DtypeError, ShapeError
from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import Op, autocast
from fastffn.ops.neuron_tree import cpu, dense, reference, torch_grouped, triton
from fastffn.ops.neuron_tree.request import MAX_DEPTH, Request, accumulation_dtype, depth_of, neurons_of, request_of

IMPLS = (cpu.IMPL, triton.IMPL, torch_grouped.IMPL, dense.IMPL, reference.IMPL)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fake(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    activation: str,
    straight_through: bool,
) -> tuple[torch.Tensor, ...]:
    tokens, (trees, neurons, _) = x.shape[0], w_in.shape
    return (
        x.new_empty(tokens, w_out.shape[2]),
        x.new_empty(trees, tokens, depth_of(neurons) + 1, dtype=accumulation_dtype(x.dtype)),
        x.new_empty(trees, tokens, dtype=torch.int64),
    )


def _flops(
    x: tuple[int, ...],
    w_in: tuple[int, ...],
    b_in: tuple[int, ...] | None,
    w_out: tuple[int, ...],
    activation: str,
    straight_through: bool,
) -> int:
    """Two for each multiply-add of the visited neurons."""
    trees, neurons, d_model = w_in
    return 2 * x[0] * trees * (depth_of(neurons) + 1) * (d_model + w_out[2])


NEURON_TREE = Op(
    "neuron_tree",
    tensors="Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out",
    options="str activation, bool straight_through",
    saved=2,
    fake=_fake,
    request=request_of,
    example=Request("cpu", torch.float32, 512, 1, 11, 768, 768),
    impls=IMPLS,
    flops=_flops,
)


def neuron_tree(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    activation: str = "gelu",
    *,
    straight_through: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Evaluate P conditional trees of neurons for every token.

        s = <x, w_in[n]> + b_in[n];  y += act(s) * w_out[n];  n <- 2n + 1 + (s > 0)

    from n = 0 down `depth + 1` levels; a score of exactly zero goes left, and so does NaN.

    Args:
        x: `[..., D]`, float32, bfloat16, float16 or float64. Under autocast all tensors are cast as those of a linear
            layer are.
        w_in: `[P, N, D]` with `N = 2**(depth + 1) - 1`, depth at most 30.
        b_in: `[P, N]`, or None.
        w_out: `[P, N, O]`.
        activation: a name from transformers' ACT2FN.
        straight_through: whether decisions get a gradient, as if going right had weighed sigmoid(s) and going left
            1 - sigmoid(s); see `reference.py`. The output is the same.
        out: `[..., O]`, contiguous, in the dtype and on the device of `x`, its memory shared with no other argument: is
            filled and returned. Only where no gradient is asked.

    Returns:
        `[..., O]`, the dtype of `x`.

    Raises:
        ShapeError: the last axis of `x` is not D, N is not a full tree, or the weights do not fit each other or `out`.
        DtypeError: `x` is not of a floating dtype, or another tensor is not of that of `x`.
        DeviceError: the tensors are on several devices.
        ConfigError: the activation is unknown.
        BackendError: no backend can run this call; or `out` is given and a gradient asked.

    Cost: `P (depth + 1) (D + O)` multiply-adds a token; the dense layer of the same width costs `P N (D + O)`. What the
        backends add to that is in README.md of this folder.
    Gradient: through the visited neurons only; the path is a constant unless `straight_through`. Once: there is no
        second derivative.
    Reference: Belcak and Wattenhofer, Exponentially Faster Language Modelling, arXiv 2311.10770, section 2.
    """
    x, w_in, b_in, w_out = autocast(x, w_in, b_in, w_out)  # type: ignore[assignment]
    meta = (x.shape, x.dtype, x.device, w_in.shape, w_in.dtype, w_in.device, w_out.shape, w_out.dtype, w_out.device)
    biases = (None, None, None) if b_in is None else (b_in.shape, b_in.dtype, b_in.device)
    # Checked once for all calls of the same shapes: as long as the kernel itself takes for one token. While torch
    # traces, shapes may be symbols.
    check: Callable[..., Request] = _check if torch.compiler.is_compiling() or x.is_meta else _check_once
    request = check(*meta, *biases, activation)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    flat_out = None
    if out is not None:
        _check_out(out, (*x.shape[:-1], w_out.shape[2]), x, (x, w_in, b_in, w_out))
        flat_out = out.view(-1, w_out.shape[2])
    y = NEURON_TREE((flat, w_in, b_in, w_out), (activation, straight_through), flat_out, request)
    if out is not None:
        return out
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w_out.shape[2])


def _check(
    x: torch.Size,
    x_dtype: torch.dtype,
    x_device: torch.device,
    w_in: torch.Size,
    w_in_dtype: torch.dtype,
    w_in_device: torch.device,
    w_out: torch.Size,
    w_out_dtype: torch.dtype,
    w_out_device: torch.device,
    b_in: torch.Size | None,
    b_in_dtype: torch.dtype | None,
    b_in_device: torch.device | None,
    activation: str,
) -> Request:
    """Refuses shapes, dtypes, devices and names that do not fit; what fits makes a request."""
    get_activation(activation)
    if x_dtype not in DTYPES:
        raise DtypeError(
            f"neuron_tree got x of dtype {x_dtype}; it takes float32, bfloat16, float16 and float64. Convert it first."
        )
    if len(w_in) != 3 or len(w_out) != 3:
        raise ShapeError(
            f"neuron_tree got w_in {list(w_in)} and w_out {list(w_out)}; they must be [P, N, D] and [P, N, O]: P trees "
            "of N nodes. For one tree, unsqueeze(0)."
        )
    trees, neurons, d_model = w_in
    if not x or x[-1] != d_model:
        raise ShapeError(
            f"neuron_tree got x of shape {list(x)} and w_in {list(w_in)}; the last axes of both must be the same width "
            "D."
        )
    if w_out[:2] != w_in[:2] or (b_in is not None and b_in != w_in[:2]):
        raise ShapeError(
            f"neuron_tree got w_in {list(w_in)}, b_in {None if b_in is None else list(b_in)} and w_out {list(w_out)}; "
            "they must be [P, N, D], [P, N] (or None) and [P, N, O] with the same P and N."
        )
    depth = depth_of(neurons)
    if neurons_of(depth) != neurons or depth > MAX_DEPTH or not (trees and d_model and w_out[2]):
        raise ShapeError(
            f"neuron_tree got w_in {list(w_in)} and w_out {list(w_out)}; none of their axes may be empty, and N must "
            f"be 2**(depth + 1) - 1 for a depth of 0 to {MAX_DEPTH}: 1, 3, 7, 15, 31, ..."
        )
    for name, dtype, device in (
        ("w_in", w_in_dtype, w_in_device),
        ("b_in", b_in_dtype, b_in_device),
        ("w_out", w_out_dtype, w_out_device),
    ):
        if dtype is not None and dtype != x_dtype:
            raise DtypeError(
                f"neuron_tree got x of {x_dtype} and {name} of {dtype}; convert one to the other, or use "
                "torch.autocast."
            )
        if device is not None and device != x_device:
            raise DeviceError(f"neuron_tree got x on {x_device} and {name} on {device}; move one to the other.")
    tokens = math.prod(x[:-1])
    return Request(x_device.type, x_dtype, tokens, trees, depth, d_model, w_out[2])


_check_once = lru_cache(maxsize=4096)(_check)


def _check_out(
    out: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor, given: tuple[torch.Tensor | None, ...]
) -> None:
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ShapeError(
            f"neuron_tree got out of shape {list(out.shape)} (strides {list(out.stride())}); it must be contiguous and "
            f"{list(shape)}."
        )
    if out.dtype != x.dtype:
        raise DtypeError(f"neuron_tree got out of {out.dtype} for x of {x.dtype}; they must be the same.")
    if out.device != x.device:
        raise DeviceError(f"neuron_tree got out on {out.device} for x on {x.device}; they must be the same.")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*given, out)):
        raise BackendError(
            "neuron_tree got out= where a gradient is asked; leave it out, or call under torch.no_grad()."
        )
