"""The public function `neuron_tree_int8`: checks, and the operator behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from fastffn.errors import BackendError, DeviceError, DtypeError, ShapeError
from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import Op
from fastffn.ops.neuron_tree.request import MAX_DEPTH, Request, depth_of, neurons_of
from fastffn.ops.neuron_tree_int8 import cpu, reference

IMPLS = (cpu.IMPL, reference.IMPL)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fake(x: torch.Tensor, *given: object) -> tuple[torch.Tensor, ...]:
    w_out = given[3]
    assert isinstance(w_out, torch.Tensor)
    return (x.new_empty(x.shape[0], w_out.shape[2]),)


def _request(x: torch.Tensor, w_in: torch.Tensor, *given: object) -> Request:
    trees, neurons, d_model = w_in.shape
    w_out = given[2]
    assert isinstance(w_out, torch.Tensor)
    return Request(x.device.type, x.dtype, x.shape[0], trees, depth_of(neurons), d_model, w_out.shape[2])


def _flops(x: tuple[int, ...], w_in: tuple[int, ...], *given: object) -> int:
    """Two for each multiply-add of the visited neurons."""
    trees, neurons, d_model = w_in
    w_out = given[2]
    assert isinstance(w_out, (tuple, list, torch.Size))
    return int(2 * x[0] * trees * (depth_of(neurons) + 1) * (d_model + w_out[2]))


NEURON_TREE_INT8 = Op(
    "neuron_tree_int8",
    tensors="Tensor x, Tensor w_in, Tensor in_scale, Tensor? b_in, Tensor w_out, Tensor out_scale",
    options="str activation",
    saved=None,
    fake=_fake,
    request=_request,
    example=Request("cpu", torch.float32, 512, 1, 11, 768, 768),
    impls=IMPLS,
    flops=_flops,
)


def neuron_tree_int8(
    x: torch.Tensor,
    w_in: torch.Tensor,
    in_scale: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    out_scale: torch.Tensor,
    activation: str = "gelu",
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`neuron_tree` with int8 weights, each row with a scale of its own; for inference.

        s = in_scale[n] <x, w_in[n]> + b_in[n];  y += act(s) out_scale[n] w_out[n];  n <- 2n + 1 + (s > 0)

    Args:
        x: `[..., D]`, float32, bfloat16 or float16. Tokens are not quantised.
        w_in: `[P, N, D]`, int8, with `N = 2**(depth + 1) - 1`, depth at most 30.
        in_scale: `[P, N]`, float32; b_in: `[P, N]`, float32, or None.
        w_out: `[P, N, O]`, int8; out_scale: `[P, N]`, float32.
        activation: a name from transformers' ACT2FN.
        out: `[..., O]`, contiguous, in the dtype and on the device of `x`, sharing memory with no other argument: is
            filled and returned.

    Returns:
        `[..., O]`, the dtype of `x`. `quantize_rows` of `fastffn.ops.int8` makes the weights.

    Raises:
        ShapeError: the last axis of `x` is not D, N is not a full tree, or the tensors do not fit each other.
        DtypeError: a tensor has another dtype than above.
        DeviceError: the tensors are on several devices.
        ConfigError: the activation is unknown.
        BackendError: a gradient is asked.

    Cost: `P (depth + 1) (D + O)` multiply-adds and as many bytes a token.
    Reference: as `neuron_tree`; one scale for each row of weights is what int8 inference commonly has.
    """
    # Checked once for all calls of the same shapes; while torch traces, shapes may be symbols.
    check: Callable[..., Request] = _check if torch.compiler.is_compiling() or x.is_meta else _check_once
    tensors = (x, w_in, in_scale, b_in, w_out, out_scale)
    request = check(*(None if t is None else _Meta(t.shape, t.dtype, t.device) for t in tensors), activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise BackendError(
            "neuron_tree_int8 got tensors that ask for a gradient; it is for inference. Call it under "
            "torch.no_grad(), or train the tree that the weights were quantised from."
        )
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], w_out.shape[2])
    flat_out = None
    if out is not None:
        if tuple(out.shape) != shape or not out.is_contiguous() or out.dtype != x.dtype or out.device != x.device:
            raise ShapeError(
                f"neuron_tree_int8 got out of shape {list(out.shape)} (strides {list(out.stride())}), {out.dtype} on "
                f"{out.device}; it must be contiguous, {list(shape)}, {x.dtype} on {x.device}."
            )
        flat_out = out.view(-1, w_out.shape[2])
    y = NEURON_TREE_INT8((flat, *tensors[1:]), (activation,), flat_out, request)
    if out is not None:
        return out
    return y if x.dim() == 2 else y.view(shape)


class _Meta(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _check(
    x: _Meta,
    w_in: _Meta,
    in_scale: _Meta,
    b_in: _Meta | None,
    w_out: _Meta,
    out_scale: _Meta,
    activation: str,
) -> Request:
    """Refuses shapes, dtypes, devices and names that do not fit; what fits makes a request."""
    get_activation(activation)
    if x.dtype not in DTYPES:
        raise DtypeError(f"neuron_tree_int8 got x of {x.dtype}; it takes float32, bfloat16 and float16.")
    if len(w_in.shape) != 3 or len(w_out.shape) != 3 or w_out.shape[:2] != w_in.shape[:2]:
        raise ShapeError(
            f"neuron_tree_int8 got w_in {list(w_in.shape)} and w_out {list(w_out.shape)}; they must be [P, N, D] and "
            "[P, N, O] with the same P and N."
        )
    trees, neurons, d_model = w_in.shape
    depth = depth_of(neurons)
    if neurons_of(depth) != neurons or depth > MAX_DEPTH or not (trees and d_model and w_out.shape[2]):
        raise ShapeError(
            f"neuron_tree_int8 got w_in {list(w_in.shape)} and w_out {list(w_out.shape)}; none of their axes may be "
            f"empty, and N must be 2**(depth + 1) - 1 for a depth of 0 to {MAX_DEPTH}: 1, 3, 7, 15, 31, ..."
        )
    if not x.shape or x.shape[-1] != d_model:
        raise ShapeError(
            f"neuron_tree_int8 got x of shape {list(x.shape)} and w_in {list(w_in.shape)}; the last axes of both must "
            "be the same width D."
        )
    named = {"w_in": w_in, "w_out": w_out, "in_scale": in_scale, "b_in": b_in, "out_scale": out_scale}
    for name, meta in named.items():
        if meta is None:
            continue
        weights = name.startswith("w_")
        wanted = torch.int8 if weights else torch.float32
        if meta.dtype != wanted:
            raise DtypeError(f"neuron_tree_int8 got {name} of {meta.dtype}; it must be {wanted}.")
        if meta.device != x.device:
            raise DeviceError(f"neuron_tree_int8 got x on {x.device} and {name} on {meta.device}; move one.")
        if not weights and meta.shape != w_in.shape[:2]:
            raise ShapeError(
                f"neuron_tree_int8 got {name} of shape {list(meta.shape)}; it must be [P, N], here "
                f"{list(w_in.shape[:2])}."
            )
    return Request(x.device.type, x.dtype, math.prod(x.shape[:-1]), trees, depth, d_model, w_out.shape[2])


_check_once = lru_cache(maxsize=4096)(_check)
