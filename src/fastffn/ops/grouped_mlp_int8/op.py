"""The public function `grouped_mlp_int8`: checks, and the operator behind it."""

from __future__ import annotations

import torch

from fastffn.errors import BackendError
from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import Op, autocast
from fastffn.ops.grouped_mlp.op import Request, check
from fastffn.ops.grouped_mlp_int8 import cpu, multiplied_out, reference

IMPLS = (cpu.IMPL, multiplied_out.IMPL, reference.IMPL)


def _request(x: torch.Tensor, index: torch.Tensor, up_weight: torch.Tensor, *given: object) -> Request:
    mlps, width, d_model = up_weight.shape
    down_weight, gate_weight = given[2], given[5]
    assert isinstance(down_weight, torch.Tensor)
    return Request(
        x.shape[0], mlps, d_model, width, down_weight.shape[1], gate_weight is not None, x.dtype, x.device.type
    )


def _fake(x: torch.Tensor, *given: object) -> tuple[torch.Tensor, ...]:
    down_weight = given[4]
    assert isinstance(down_weight, torch.Tensor)
    return (x.new_empty(x.shape[0], down_weight.shape[1]),)


def _flops(x: torch.Size, index: torch.Size, up_weight: torch.Size, *given: object) -> int:
    _, width, d_model = up_weight
    down_weight, gate_weight = given[2], given[5]
    assert isinstance(down_weight, (tuple, list, torch.Size))
    return int(2 * x[0] * width * (d_model * (1 if gate_weight is None else 2) + down_weight[1]))


GROUPED_MLP_INT8 = Op(
    "grouped_mlp_int8",
    tensors=(
        "Tensor x, Tensor index, Tensor up_weight, Tensor up_scale, Tensor? up_bias, Tensor down_weight, "
        "Tensor down_scale, Tensor? down_bias, Tensor? gate_weight, Tensor? gate_scale, Tensor? gate_bias"
    ),
    options="str activation",
    saved=None,
    fake=_fake,
    request=_request,
    example=Request(512, 16, 768, 8, 768, False, torch.float32, "cpu"),
    impls=IMPLS,
    flops=_flops,
)


def grouped_mlp_int8(
    x: torch.Tensor,
    index: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None = None,
    gate_scale: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_mlp` with int8 weights, each row with a scale of its own; for inference.

    A row of weights is its int8 numbers times its scale; tokens are not quantised, sums are kept in float32.

    Args:
        x: `[T, D]`, any floating-point dtype.
        index: `[T]`, whole numbers from 0 to E - 1.
        up_weight, gate_weight: `[E, W, D]`, int8; up_scale, gate_scale: `[E, W]`; up_bias, gate_bias: `[E, W]` or None.
        down_weight: `[E, O, W]`, int8; down_scale: `[E, O]`; down_bias: `[E, O]` or None. Scales and biases have the
            dtype of `x`. `quantize_rows` of `fastffn.ops.int8` makes weights and scales.
        activation: a name from transformers' ACT2FN.
        out: `[T, O]`, filled and returned if given.

    Returns:
        `[T, O]`, the dtype of `x`; under autocast its dtype.

    Raises:
        ShapeError, DtypeError, DeviceError, IndexRangeError: as `grouped_mlp`.
        BackendError: a gradient is asked.

    Cost: as `grouped_mlp`; a token that has an MLP to itself reads a quarter of the bytes of float32.
    Reference: one scale for each row of weights, and inputs as they are, is what "weight-only int8" commonly means.
    """
    of_gate = (gate_weight, gate_scale, gate_bias)
    tensors = (x, index, up_weight, up_scale, up_bias, down_weight, down_scale, down_bias, *of_gate)
    check(
        (x, index, up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias),
        out,
        scales=(up_scale, down_scale, gate_scale),
    )
    get_activation(activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise BackendError(
            "grouped_mlp_int8 got tensors that ask for a gradient; it is for inference. Call it under "
            "torch.no_grad(), or grouped_mlp with the weights that dequantize_rows of fastffn.ops.int8 gives."
        )
    return GROUPED_MLP_INT8(autocast(*tensors), (activation,), out)
