"""The `int8` kind: a dense FFN for inference whose weights are int8 numbers, with one scale for each row.

A batch of a few tokens costs what reading the weights costs: a quarter of float32's bytes. Tokens are not quantised:
nothing is lost by their outliers, and nothing is won where arithmetic decides, for products are float32's. Where a
processor has products of bfloat16, a dense FFN of that dtype is faster from eight tokens on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from fastffn import ops
from fastffn.nn.base import MergedTensor
from fastffn.nn.dense import DenseConfig, DenseFFN, LinearMapFFN
from fastffn.ops.int8 import dequantize_rows, quantize_rows
from fastffn.registry import register_ffn

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Int8Config(DenseConfig):
    """Configuration of the `int8` kind: what a dense FFN fixes, and nothing to choose; see `DenseConfig`."""

    TRAINS: ClassVar[bool] = False

    @classmethod
    def sizes_for(cls, dense: DenseConfig) -> list[Self]:
        """See `FFNConfig.sizes_for`: there is one."""
        return [cls()]


class Int8Linear(nn.Module):
    """A linear map whose weights are int8: `y = x (scale * weight)^T + bias`.

    Shapes:
        weight: `[out, in]` int8; scale, bias: `[out]`. All are buffers: nothing is trained, a gradient reaches `x`.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        start = nn.Linear(d_in, d_out, bias)
        weight, scale = quantize_rows(start.weight, start.weight.dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", start.bias.detach() if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in] -> [..., out]`, by an ordinary product: for gradients."""
        scale, bias = self.floats(x.dtype)
        return F.linear(x, dequantize_rows(self.weight, scale), bias)

    def floats(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and biases in a dtype: FSDP, which casts parameters for a mixed precision, leaves buffers alone."""
        return self.scale.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Widths, as `nn.Linear` has them."""
        d_out, d_in = self.weight.shape
        return f"in_features={d_in}, out_features={d_out}, bias={self.bias is not None}"


@register_ffn("int8", Int8Config)
class Int8FFN(LinearMapFFN[Int8Config]):
    """A dense FFN with int8 weights, a scale for each row: for inference.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of `x`.
        up.weight, gate.weight: `[H, D]` int8; up.scale, gate.scale, up.bias, gate.bias: `[H]`; down.weight: `[O, H]`
        int8; down.scale, down.bias: `[O]`. All are buffers: nothing is trained. Scales have the module's dtype; in
        float16 those of rows whose largest weight is below 0.008 lose precision, in bfloat16 none does when it is made.

    Raises:
        ShapeError: the last axis of `x` is not D.
    Cost: the multiply-adds of a dense FFN in float32, with a quarter of float32's bytes. Where `x` asks for a gradient
        the weights are multiplied out at each call.
    """

    up: Int8Linear
    gate: Int8Linear
    down: Int8Linear

    def linear_map(self, d_in: int, d_out: int) -> Int8Linear:
        """A map of int8 weights."""
        return Int8Linear(d_in, d_out, self.config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D] -> [..., O]`."""
        self.check_input(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        index = torch.zeros(flat.shape[0], dtype=torch.int64, device=x.device)
        tensors: list[torch.Tensor | None] = []
        for linear in (self.up, self.down, self.gate) if self.config.gated else (self.up, self.down):
            scale, bias = linear.floats(x.dtype)
            tensors += [linear.weight.unsqueeze(0), scale.unsqueeze(0), None if bias is None else bias.unsqueeze(0)]
        y = ops.grouped_mlp_int8(flat, index, *tensors, activation=self.config.activation)  # type: ignore[arg-type]
        result: torch.Tensor = self.dropout(y.view(*x.shape[:-1], y.shape[-1]))
        return result

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: Int8Config, inputs: torch.Tensor | None = None) -> Self:
        """`dense` with every row of weights rounded to int8."""
        with torch.device("meta"):
            module = cls(config.fitted_to(dense.config))
        state = {}
        for name, value in dense.state_dict().items():
            if not name.endswith(".weight"):
                state[name] = value.clone()
                continue
            rows, scale = quantize_rows(value, value.dtype)
            state |= {name: rows, name.replace(".weight", ".scale"): scale}
        module.load_state_dict(state, assign=True)
        return module.train(dense.training)

    @classmethod
    def merged_tensors(cls, config: Int8Config) -> dict[str, MergedTensor]:
        """The weights that the int8 numbers stand for."""
        recipe = {}
        for name in config.linear_maps():
            recipe[f"{name}.weight"] = MergedTensor((f"{name}.weight", f"{name}.scale"), dequantize_rows)
            if config.bias:
                recipe[f"{name}.bias"] = MergedTensor((f"{name}.bias",))
        return recipe
