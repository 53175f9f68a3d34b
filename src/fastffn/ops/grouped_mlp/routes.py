"""When the compiled kernels leave a call to plain torch operators. A committed rule, not a measurement at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastffn.ops.cpu import multiplies_bfloat16, multiplies_tiles

if TYPE_CHECKING:
    from fastffn.ops.grouped_mlp.op import Request

# Tokens of an MLP on average, and the smallest width of a product, from which twice the multiply-adds an instruction
# outweigh the copies and calls of `torch_grouped`; README.md of this folder has the measurements.
TOKENS, WIDTH = 128, 128
# Multiply-adds of an MLP on average from which products of whole tiles (AMX) do.
TILED = 25e6


def why_not(request: Request) -> str | None:
    """Why the compiled kernels leave `request` to `torch_grouped`; None if they do not."""
    if request.dtype == torch.bfloat16 and multiplies_tiles():
        maps = request.d_model * (2 if request.gated else 1) + request.d_out
        pays = request.tokens * request.width * maps >= TILED * request.mlps
    else:
        pays = many_tokens(request)
    return "leaves it to torch_grouped, whose products use this processor's instructions for bfloat16" if pays else None


def many_tokens(request: Request) -> bool:
    """Whether there are products of bfloat16 for which it pays to copy tokens, and to multiply int8 weights out."""
    if request.dtype != torch.bfloat16 or request.tokens < TOKENS * request.mlps or not multiplies_bfloat16():
        return False
    return min(request.d_model, request.width, request.d_out) >= WIDTH
