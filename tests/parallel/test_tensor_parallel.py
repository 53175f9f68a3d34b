"""Tensor parallelism: the plans of the kinds that have one, on two processes, against the whole module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import fastffn
from fastffn.errors import KindError
from fastffn.nn import FFNConfig
from fastffn.registry import kind_of
from tests.contract.test_kinds import NAMES, D, O, config_of, variants
from tests.parallel.processes import on_two_processes

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
RANK = 5
PLANNED = ("dense", "low_rank")


class AllReduces(TorchDispatchMode):
    """Widths of the tensors that are summed over processes."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations on its parts come by here afterwards
        if "all_reduce" in str(function):
            self.widths.append(args[0].shape[-1])
        return function(*args, **(kwargs or {}))


def is_the_same(mesh: DeviceMesh, config: FFNConfig) -> None:
    torch.manual_seed(1)
    alone = fastffn.build(config).double()
    split = copy.deepcopy(alone)
    # Each process's own weights do not matter: parallelize_module takes those of process 0.
    if mesh.get_rank() == 1:
        for parameter in split.parameters():
            parameter.data.zero_()
    split = parallelize_module(split, mesh, kind_of(config).module.tensor_parallel_plan(config))
    assert all(isinstance(parameter, DTensor) for parameter in split.parameters())
    # Of each matrix between d_model and d_hidden, each process has a half.
    assert sum(p.to_local().numel() for p in split.parameters()) < sum(p.numel() for p in alone.parameters())
    optimizers = [torch.optim.AdamW(ffn.parameters(), lr=1e-2, foreach=True) for ffn in (alone, split)]
    for _ in range(3):
        x = torch.randn(2, 6, D, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        forward, backward = AllReduces(), AllReduces()
        y = alone(inputs[0])
        with forward:
            split_y = split(inputs[1])
        torch.testing.assert_close(split_y, y, **TOLERANCE)
        y.square().mean().backward()
        with backward:
            split_y.square().mean().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **TOLERANCE)
        for (name, one), other in zip(alone.named_parameters(), split.named_parameters(), strict=True):
            torch.testing.assert_close(other[1].grad.full_tensor(), one.grad, **TOLERANCE, msg=name)
        # What the docstrings say is sent: a thin product instead of a whole output.
        thin = kind_of(config).name == "low_rank"
        assert forward.widths == [RANK if thin else config.resolved().d_out], forward.widths
        assert backward.widths == [RANK if thin else D] * (2 if config.gated else 1), backward.widths
        # Too large a limit to cut anything: torch 2.9 sums the norm of DTensors in fewer digits.
        norms = [torch.nn.utils.clip_grad_norm_(ffn.parameters(), 1e9) for ffn in (alone, split)]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], rtol=1e-5, atol=0)
        for ffn, optimizer in zip((alone, split), optimizers, strict=True):
            ffn.decay_product_(0.01)
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(alone.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(other.full_tensor(), one, rtol=1e-6, atol=1e-8, msg=name)


def cases() -> list[FFNConfig]:
    found = []
    for name in PLANNED:
        rank = {"rank": RANK} if name == "low_rank" else {}
        plain = [{}, {"d_out": O}, {"bias": False}, {"gated": True}, {"gated": True, "bias": False, "d_out": O}]
        found += [config_of(name, **rank, **changes) for changes in plain]
    return found


def check_all(mesh: DeviceMesh) -> None:
    for config in cases():
        try:
            is_the_same(mesh, config)
        except Exception as error:
            raise AssertionError(f"{config}: {error}") from error


@pytest.mark.slow
def test_plans_compute_the_same() -> None:
    on_two_processes(check_all)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PLANNED])
def test_kinds_without_a_plan_say_so(name: str) -> None:
    config = variants(name)[0]
    with pytest.raises(KindError, match=r"has no tensor-parallel plan.*fully_shard"):
        kind_of(config).module.tensor_parallel_plan(config)
