"""When the compiled kernels leave a call to plain torch operators. A committed rule, not a measurement at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastffn.ops.cpu import multiplies_bfloat16, multiplies_tiles

if TYPE_CHECKING:
    from fastffn.ops.grouped_mlp.op import Request

# The smallest width, and tokens of an MLP on average, from which twice the multiply-adds an instruction outweigh the
# copies and calls of `torch_grouped`; README.md of this folder has the measurements.
WIDTH, TOKENS = 128, 128
# Multiply-adds of an MLP on average from which products of whole tiles (AMX) do.
TILED = 25e6


def why_not(request: Request) -> str | None:
    """Why the compiled kernels leave `request` to `torch_grouped`; None if they do not."""
    maps = request.d_model * (2 if request.gated else 1) + request.d_out
    tiled = request.tokens * request.width * maps >= TILED * request.mlps
    if not (_wide(request) and tiled if multiplies_tiles() else many_tokens(request)):
        return None
    return "leaves it to torch_grouped, whose products use this processor's instructions for bfloat16"


def many_tokens(request: Request) -> bool:
    """Whether there are products of bfloat16 for which it pays to copy tokens, and to multiply int8 weights out."""
    return multiplies_bfloat16() and _wide(request) and request.tokens >= TOKENS * request.mlps


def _wide(request: Request) -> bool:
    """Whether these are products of bfloat16, none of them narrow."""
    return request.dtype == torch.bfloat16 and min(request.d_model, request.width, request.d_out) >= WIDTH
