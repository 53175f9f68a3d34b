"""When the compiled kernels leave a call to plain torch operators. A committed rule, not a measurement at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastffn.ops.cpu import multiplies_bfloat16

if TYPE_CHECKING:
    from fastffn.ops.grouped_mlp.op import Request

# Tokens of an MLP on average, and the smallest width of a product, from which twice the multiply-adds an instruction
# outweigh the copies and calls of `torch_grouped`; README.md of this folder has the measurements.
TOKENS, WIDTH = 128, 128


def why_not(request: Request) -> str | None:
    """Why the compiled kernels leave `request` to `torch_grouped`; None if they do not."""
    if request.dtype != torch.bfloat16 or request.tokens < TOKENS * request.mlps or not multiplies_bfloat16():
        return None
    if min(request.d_model, request.width, request.d_out) < WIDTH:
        return None
    return "leaves it to torch_grouped, whose products use this processor's instructions for bfloat16"
