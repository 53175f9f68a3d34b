"""Parameters that are spread over processes (DTensor), for code that needs the whole of them.

Nothing here imports torch.distributed unless a tensor is in fact a DTensor: not every torch is built with it.
"""

from __future__ import annotations

from typing import Any

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a DTensor, as under FSDP and tensor parallelism."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of `tensor`, detached; itself where it is an ordinary one. A collective: every process must call it."""
    sharded: Any = tensor
    gathered: torch.Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return gathered.detach()


@torch.no_grad()
def subtract_(tensor: torch.Tensor, step: torch.Tensor, amount: float) -> None:
    """`tensor -= amount * step` in place, where `step` is whole and every process has the same one."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        # No process is the source: each cuts its own part out of its own copy, nothing is sent.
        step = distribute_tensor(step, sharded.device_mesh, sharded.placements, src_data_rank=None)
    tensor.sub_(step, alpha=amount)
