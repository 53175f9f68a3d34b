"""`leaf_mixture`: checks, the operation that torch knows, and the order of its implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastffn.errors import DtypeError, ShapeError
from fastffn.ops.dispatch import Op, autocast
from fastffn.ops.leaf_mixture import torch_chunked


@dataclass(frozen=True)
class Request:
    """What decides which implementation runs: sizes, dtype and kind of device."""

    tokens: int
    leaves: int
    d_model: int
    width: int
    d_out: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens through {self.leaves} leaves {self.d_model} -> {self.width} -> {self.d_out} in "
            f"{self.dtype} on '{self.device}'"
        )


def _request(
    x: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    activation: str,
) -> Request:
    leaves, width, d_model = up_weight.shape
    return Request(x.shape[0], leaves, d_model, width, down_weight.shape[1], x.dtype, x.device.type)


def _fake(
    x: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    leaves, width, _ = up_weight.shape
    return x.new_empty(x.shape[0], down_weight.shape[1]), x.new_empty(x.shape[0], leaves * width)


def _flops(
    x: torch.Size,
    scores: torch.Size,
    kept: torch.Size | None,
    up_weight: torch.Size,
    up_bias: torch.Size,
    down_weight: torch.Size,
    down_bias: torch.Size,
    activation: str,
) -> int:
    leaves, width, d_model = up_weight
    return 2 * x[0] * leaves * (width * (d_model + down_weight[1]) + down_weight[1])


OP = Op(
    "leaf_mixture",
    tensors=(
        "Tensor x, Tensor scores, Tensor? kept, Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias"
    ),
    options="str activation",
    saved=1,
    fake=_fake,
    request=_request,
    example=Request(512, 16, 768, 8, 768, torch.float32, "cpu"),
    impls=(torch_chunked.IMPL,),
    flops=_flops,
)


def leaf_mixture(
    x: torch.Tensor,
    scores: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    *,
    kept: torch.Tensor | None = None,
    activation: str = "gelu",
) -> torch.Tensor:
    """All leaves of a tree for every token, each weighted by its path: the soft training of a leaf tree.

        y = sum over l of m_l leaf_l(x),   m_l the product of sigmoid(score) (right) and 1 - sigmoid(score) (left)

    Args:
        x: `[T, D]`, any floating-point dtype.
        scores: `[T, N]` of the nodes, N = 2^depth - 1 = L - 1; node j has the children 2j + 1 and 2j + 2.
        up_weight: `[L, W, D]`; up_bias: `[L, W]`; down_weight: `[L, O, W]`; down_bias: `[L, O]`.
        kept: `[T, L, W]`, what the hidden activations are multiplied with (dropout); no gradient.
        activation: a name from transformers' ACT2FN.

    Returns:
        `[T, O]`, the dtype of `x`; under autocast its dtype.

    Raises:
        ShapeError: the shapes do not fit, or the number of leaves is no power of two.
        DtypeError: `x` is not floating-point.
    Cost: `L W (D + O)` multiply-adds a token, those of a dense FFN of width L W, plus `L O`. The mixture itself is
    computed in float32 at least.
    Memory: kept for the backward pass are `T (L W + N)` numbers.
    Reference: Belcak and Wattenhofer, Fast Feedforward Networks, arXiv 2308.14711, FORWARD_T.
    """
    if up_weight.dim() != 3 or 0 in up_weight.shape or up_weight.shape[0] & (up_weight.shape[0] - 1):
        raise ShapeError(f"up_weight has the shape {list(up_weight.shape)}; it must be [L, W, D], L a power of two.")
    leaves, width, d_model = up_weight.shape
    if x.dim() != 2 or x.shape[1] != d_model:
        raise ShapeError(f"x has the shape {list(x.shape)}; it must be [T, D] with D = {d_model}, as in up_weight.")
    if down_weight.dim() != 3 or (down_weight.shape[0], down_weight.shape[2]) != (leaves, width):
        raise ShapeError(f"down_weight has the shape {list(down_weight.shape)}; it must be [{leaves}, O, {width}].")
    wanted = {
        "scores": (scores, (x.shape[0], leaves - 1)),
        "up_bias": (up_bias, (leaves, width)),
        "down_bias": (down_bias, (leaves, down_weight.shape[1])),
        "kept": (kept, (x.shape[0], leaves, width)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has the shape {list(tensor.shape)}; it must be {list(shape)}.")
    if not x.is_floating_point():
        raise DtypeError(f"x is {x.dtype}; it must be floating-point: x.float() makes it so.")
    cast = autocast(x, scores, kept, up_weight, up_bias, down_weight, down_bias)
    return OP(cast, (activation,))
