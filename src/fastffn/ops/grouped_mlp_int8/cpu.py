"""`grouped_mlp_int8` by the compiled kernels of csrc/grouped_mlp.cpp: int8 rows are widened as they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastffn.ops import cpu
from fastffn.ops.dispatch import Impl
from fastffn.ops.grouped_mlp import cpu as grouped_mlp
from fastffn.ops.grouped_mlp.routes import many_tokens

if TYPE_CHECKING:
    import torch

    from fastffn.ops.grouped_mlp.op import Request


def forward(
    x: torch.Tensor, index: torch.Tensor, *given: Any, keep: bool, out: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """See `reference.py`."""
    up, up_scale, up_bias, down, down_scale, down_bias, gate, gate_scale, gate_bias, activation = given
    maps, scales = (up, up_bias, down, down_bias, gate, gate_bias), (up_scale, down_scale, gate_scale)
    return grouped_mlp.forward(x, index, *maps, activation, scales=scales, keep=False, out=out)


def _refuses(request: Request) -> str | None:
    return cpu.refuses(request.device, request.dtype, request.tokens)


def _yields(request: Request) -> str | None:
    if not many_tokens(request):
        return None
    return "leaves it to multiplied_out, whose products use this processor's instructions for bfloat16"


IMPL = Impl(name="cpu", forward=forward, refuses=_refuses, yields=_yields)
