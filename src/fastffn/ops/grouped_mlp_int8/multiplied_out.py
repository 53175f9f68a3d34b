"""`grouped_mlp_int8` by the torch operators of `grouped_mlp` on the weights multiplied out, in the dtype of `x`.

For accelerators, for large batches where products of bfloat16 are fast, and where there is no compiler.
"""

from __future__ import annotations

from typing import Any

import torch

from fastffn.ops.dispatch import Impl
from fastffn.ops.grouped_mlp import torch_grouped
from fastffn.ops.grouped_mlp_int8.reference import floats_of


@torch.no_grad()
def forward(
    x: torch.Tensor, index: torch.Tensor, *given: Any, keep: bool, out: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """See `reference.py`; weights and products are rounded as those of a dense FFN in that dtype."""
    *maps, activation = given
    floats = floats_of(tuple(maps), x.dtype)
    return torch_grouped.IMPL.forward(x, index, *floats, activation, keep=False, out=out)


IMPL = Impl(name="multiplied_out", forward=forward)
