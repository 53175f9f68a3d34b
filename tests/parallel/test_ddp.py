"""DistributedDataParallel: converted models of every family, and every kind, learn in two processes what one learns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from fastffn.convert.match import fastffn_modules
from fastffn.registry import kinds
from tests.convert.models import KINDS, MODELS, make, put, tokens
from tests.parallel.processes import PROCESSES, on_two_processes

CASES = [(name, "low_rank") for name in MODELS] + [("gpt2", kind) for kind in KINDS]


def learns_the_same(mesh: DeviceMesh, name: str, kind: str) -> None:
    alone = put(make(name), kind).double().train()
    # A classifier or bare model leaves some parameters (a pooler) without a gradient.
    shared = DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=True)
    ids, rank = tokens(2 * PROCESSES), mesh.get_rank()
    # The whole batch alone: each process's gradient is averaged with the other's.
    for model, rows in ((alone, ids), (shared, ids[2 * rank : 2 * rank + 2])):
        # Without auxiliary losses: that of a batch is not the mean of its halves'.
        model(input_ids=rows)[0].square().mean().backward()
    compared = 0
    for (path, one), other in zip(alone.named_parameters(), shared.module.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=1e-9, msg=f"{name} {kind} {path}")
            compared += any(path.startswith(f"{ffn}.") for ffn, _ in fastffn_modules(alone))
    assert compared >= 4 or not kinds()[kind].config.TRAINS, (name, kind)


def check_all(mesh: DeviceMesh) -> None:
    for name, kind in CASES:
        learns_the_same(mesh, name, kind)


@pytest.mark.slow
def test_every_family_and_kind_learns_the_same() -> None:
    on_two_processes(check_all)
