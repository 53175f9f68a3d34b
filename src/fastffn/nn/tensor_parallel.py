"""Tensor parallelism: how the linear maps of an FFN are split over processes. Needs a torch with torch.distributed.

The plans (`FFN.tensor_parallel_plan`) are for `torch.distributed.tensor.parallel.parallelize_module`: input and output
of the FFN are whole on every process, the hidden activations are split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

__all__ = ["ColwiseParallel", "ParallelStyle", "Replicated", "RowwiseParallel"]


class Replicated(ParallelStyle):
    """A module that every process holds and computes whole.

    Its parameters become DTensors like those of its neighbours: optimizers and gradient clipping do not mix the two.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> torch.Tensor:
            local: torch.Tensor = output.to_local()
            return local

        return distribute_module(module, device_mesh, None, enter, leave)  # type: ignore[arg-type]
