"""`grouped_mlp`: checks, the operation that torch knows, and the order of its implementations."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastffn.errors import DeviceError, DtypeError, IndexRangeError, ShapeError
from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import Op, autocast
from fastffn.ops.grouped_mlp import cpu, reference, torch_grouped, triton

# So many indices are looked at one by one.
_FEW = 64


class Request(NamedTuple):
    """What decides which implementation runs: sizes, dtype and kind of device."""

    tokens: int
    mlps: int
    d_model: int
    width: int
    d_out: int
    gated: bool
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens through {self.mlps} {'gated ' if self.gated else ''}MLPs "
            f"{self.d_model} -> {self.width} -> {self.d_out} in {self.dtype} on '{self.device}'"
        )


def _request(
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
) -> Request:
    mlps, width, d_model = up_weight.shape
    gated = gate_weight is not None
    return Request(x.shape[0], mlps, d_model, width, down_weight.shape[1], gated, x.dtype, x.device.type)


def _fake(
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    tokens, (mlps, width, _) = x.shape[0], up_weight.shape
    order = x.new_empty(tokens, dtype=torch.int64)
    ends = x.new_empty(mlps, dtype=torch.int32)
    gate = x.new_empty(0) if gate_weight is None else x.new_empty(tokens, width)
    return x.new_empty(tokens, down_weight.shape[1]), order, ends, x.new_empty(tokens, width), gate


def _flops(
    x: torch.Size,
    index: torch.Size,
    up_weight: torch.Size,
    up_bias: torch.Size | None,
    down_weight: torch.Size,
    down_bias: torch.Size | None,
    gate_weight: torch.Size | None,
    gate_bias: torch.Size | None,
    activation: str,
) -> int:
    _, width, d_model = up_weight
    return 2 * x[0] * width * (d_model * (1 if gate_weight is None else 2) + down_weight[1])


OP = Op(
    "grouped_mlp",
    tensors=(
        "Tensor x, Tensor index, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, "
        "Tensor? gate_weight, Tensor? gate_bias"
    ),
    options="str activation",
    saved=4,
    fake=_fake,
    request=_request,
    example=Request(512, 16, 768, 8, 768, False, torch.float32, "cpu"),
    impls=(cpu.IMPL, triton.IMPL, torch_grouped.IMPL, reference.IMPL),
    flops=_flops,
)


def grouped_mlp(
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every token through the MLP that its index names.

        y = act(x @ up_weight[e].T + up_bias[e]) @ down_weight[e].T + down_bias[e],   e = index[n] for token n

    gated: `act(x @ gate_weight[e].T + gate_bias[e])` multiplies what stands before `down` instead of the activation.

    Args:
        x: `[T, D]`, any floating-point dtype.
        index: `[T]`, whole numbers from 0 to E - 1.
        up_weight, gate_weight: `[E, W, D]`; up_bias, gate_bias: `[E, W]` or None; all in the dtype of `x`.
        down_weight: `[E, O, W]`; down_bias: `[E, O]` or None.
        activation: a name from transformers' ACT2FN.
        out: `[T, O]`, filled and returned if given; for calls without gradients.

    Returns:
        `[T, O]`, the dtype of `x`; under autocast its dtype.

    Raises:
        ShapeError: a shape does not fit the others, or `out` is given and a gradient is asked.
        DtypeError: `x` is not floating-point, `index` not whole numbers, or the dtypes differ.
        DeviceError: the tensors are on several devices.
        IndexRangeError: an index is no MLP's. Only where that can be seen without waiting for a device, that is for
            tensors in the memory of the processor outside torch.compile; elsewhere such a token gets zeros.
    Cost: `W (D + O)` multiply-adds a token, gated `W (2 D + O)`, and a sort of the tokens; memory for `T (D + 3 W + O)`
    numbers. Nothing grows with E times T.
    Gradient: to `x` and all weights; the index has none. Deterministic.
    """
    tensors = (x, index, up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)
    check(tensors, out)
    get_activation(activation)
    return OP(autocast(*tensors), (activation,), out)


def _autocast_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check(
    tensors: tuple[torch.Tensor | None, ...],
    out: torch.Tensor | None,
    scales: tuple[torch.Tensor | None, ...] | None = None,
) -> None:
    """Refuses what does not fit; weights have the dtype of `x`, or with `scales` (of up, down and gate) int8."""
    x, index, up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias = tensors
    assert x is not None and index is not None and up_weight is not None and down_weight is not None
    if up_weight.dim() != 3 or 0 in up_weight.shape:
        raise ShapeError(f"up_weight has the shape {list(up_weight.shape)}; it must be [E, W, D], none of them 0.")
    mlps, width, d_model = up_weight.shape
    if x.dim() != 2 or x.shape[1] != d_model:
        raise ShapeError(f"x has the shape {list(x.shape)}; it must be [T, D] with D = {d_model}, as in up_weight.")
    if down_weight.dim() != 3 or (down_weight.shape[0], down_weight.shape[2]) != (mlps, width):
        raise ShapeError(
            f"down_weight has the shape {list(down_weight.shape)}; it must be [E, O, W] with E = {mlps} and "
            f"W = {width}, as in up_weight."
        )
    tokens, d_out = x.shape[0], down_weight.shape[1]
    if gate_weight is None and gate_bias is not None:
        raise ShapeError("gate_bias is given without gate_weight; give both, or neither.")
    wanted = {
        "index": (index, (tokens,)),
        "up_bias": (up_bias, (mlps, width)),
        "down_bias": (down_bias, (mlps, d_out)),
        "gate_weight": (gate_weight, (mlps, width, d_model)),
        "gate_bias": (gate_bias, (mlps, width)),
        "out": (out, (tokens, d_out)),
    }
    if scales is not None:
        weights = (up_weight, down_weight, gate_weight)
        for name, scale, weight, rows in zip(
            ("up", "down", "gate"), scales, weights, (width, d_out, width), strict=True
        ):
            if (scale is None) != (weight is None):
                raise ShapeError(
                    f"Of {name}_weight and {name}_scale one is given without the other; int8 weights have scales."
                )
            wanted[f"{name}_scale"] = (scale, (mlps, rows))
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has the shape {list(tensor.shape)}; it must be {list(shape)}.")
    if not x.is_floating_point():
        raise DtypeError(f"x is {x.dtype}; it must be floating-point: x.float() makes it so.")
    if index.is_floating_point() or index.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise DtypeError(f"index is {index.dtype}; it must hold whole numbers, such as torch.int64.")
    device, dtype = x.device, x.dtype
    for name, tensor in (
        ("up_weight", up_weight),
        ("down_weight", down_weight),
        *((n, t) for n, (t, _) in wanted.items()),
    ):
        if tensor is None:
            continue
        if tensor.device != device:
            raise DeviceError(f"{name} is on '{tensor.device}' and x on '{device}'; move one to the other.")
        if scales is not None and name.endswith("weight"):
            if tensor.dtype != torch.int8:
                raise DtypeError(
                    f"{name} is {tensor.dtype}; it must be torch.int8: quantize_rows of fastffn.ops.int8 makes it so."
                )
        elif tensor.dtype != dtype and name != "index" and not _autocast_on(device.type):
            raise DtypeError(f"{name} is {tensor.dtype} and x {dtype}; they must be of one dtype.")
    if out is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ShapeError("out is given, but a gradient is asked; call under torch.no_grad(), or leave out away.")
    if tokens and index.device.type == "cpu" and not torch.compiler.is_compiling():
        # A call of torch takes longer than to look at a few numbers.
        numbers = index.tolist() if tokens <= _FEW else [int(extreme) for extreme in torch.aminmax(index)]
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= mlps:
            raise IndexRangeError(
                f"index holds numbers from {low} to {high}; there are {mlps} MLPs, so they must be from 0 to "
                f"{mlps - 1}."
            )
