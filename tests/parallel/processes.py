"""Runs a check on two CPU processes that talk over gloo."""

from __future__ import annotations

import datetime
import os
import tempfile
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastffn.train.processes import leave

PROCESSES = 2


def on_two_processes(check: Callable[..., None], *arguments: object) -> None:
    """Calls `check(mesh, *arguments)` in each; the first error of one of them is raised here, with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (os.path.join(folder, "store"), check, arguments), nprocs=PROCESSES)


def _process(rank: int, store: str, check: Callable[..., None], arguments: tuple[object, ...]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A process that waits for one that has died ends soon.
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=limit)
    mesh: DeviceMesh = init_device_mesh("cpu", (PROCESSES,))
    check(mesh, *arguments)
    leave(0)
