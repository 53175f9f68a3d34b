"""FSDP2: every kind, sharded over two processes, learns what it learns in one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import fastffn
from fastffn.errors import KindError
from fastffn.nn import FFN, FFNConfig
from fastffn.registry import kind_of
from tests.contract.test_kinds import NAMES, D, config_of, variants
from tests.parallel.processes import PROCESSES, on_two_processes

# float64: what remains is the order of the sums, through Adam's division by small numbers.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Dimensions that two processes cannot share evenly, down to one that leaves a process without a part.
UNEVEN = [("low_rank", {"rank": 3}), ("low_rank", {"rank": 1}), ("block", {"blocks": 1}), ("block", {"rank": 3})]


class Residual(nn.Module):
    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.ffn = fastffn.build(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class Stack(nn.Module):
    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[Residual(config) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def cases() -> list[FFNConfig]:
    stackable = [c for name in NAMES for c in variants(name) if c.TRAINS and c.resolved().d_out == D]
    return stackable + [config_of(name, **options) for name, options in UNEVEN]


def full(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def learns_the_same(mesh: DeviceMesh, config: FFNConfig) -> None:
    torch.manual_seed(1)
    alone = Stack(config).double()
    start = copy.deepcopy(alone.state_dict())
    sharded = copy.deepcopy(alone)
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(layer, FSDPModule) for layer in (sharded, *sharded.layers))
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())

    models = (alone, sharded)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    rank = mesh.get_rank()
    for step in range(4):
        torch.manual_seed(100 + step)
        x, target = torch.randn(2, 4 * PROCESSES, 3, D, dtype=torch.float64)
        mine = slice(4 * rank, 4 * rank + 4)
        y, own_y = alone(x), sharded(x[mine])
        torch.testing.assert_close(own_y, y[mine], **TOLERANCE)
        (y - target).square().mean().backward()
        (own_y - target[mine]).square().mean().backward()
        for (name, one), other in zip(alone.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(full(other.grad), one.grad, **TOLERANCE, msg=name)
        for model, optimizer in zip(models, optimizers, strict=True):
            # Where training calls it: after backward, before the optimizer's step.
            for layer in model.layers:
                layer.ffn.decay_product_(0.02)
            optimizer.step()
            optimizer.zero_grad()

    expected = alone.state_dict()
    # Buffers are whole on every process, and nothing trains them.
    buffers = {name for name, _ in sharded.named_buffers()}
    for name, tensor in sharded.state_dict().items():
        if name in buffers:
            assert torch.equal(tensor, expected[name]) and torch.equal(tensor, start[name])
            continue
        torch.testing.assert_close(full(tensor), expected[name], **TOLERANCE, msg=name)
        assert not torch.allclose(expected[name], start[name], rtol=1e-3)
    state = get_model_state_dict(sharded, options=FULL)
    assert bool(state) is (rank == 0)
    if rank == 0:
        loaded = Stack(config).double()
        loaded.load_state_dict(state)
        x = torch.randn(7, D, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), alone(x), **TOLERANCE)
        if kind_of(config).module.merged_tensors(config.resolved()) is not None:
            torch.testing.assert_close(fastffn.merge(loaded)(x), alone(x), **TOLERANCE)
            with pytest.raises(KindError, match="full state dict"):
                sharded.layers[0].ffn.merge()


def decays_the_same(mesh: DeviceMesh, config: FFNConfig) -> None:
    torch.manual_seed(2)
    alone = fastffn.build(config).double()
    before = copy.deepcopy(alone.state_dict())
    sharded = fully_shard(copy.deepcopy(alone), mesh=mesh)
    assert isinstance(sharded, FSDPModule) and isinstance(sharded, FFN)
    for ffn in (alone, sharded):
        ffn.decay_product_(0.1)
    decays = kind_of(config).module.decay_product_ is not FFN.decay_product_
    for name, tensor in sharded.named_parameters():
        torch.testing.assert_close(full(tensor), alone.state_dict()[name], rtol=1e-12, atol=1e-14, msg=name)
        assert torch.equal(full(tensor), before[name]) is not (decays and tensor.ndim > 1), name


def check_all(mesh: DeviceMesh) -> None:
    for config in cases():
        try:
            learns_the_same(mesh, config)
            decays_the_same(mesh, config)
        except Exception as error:
            raise AssertionError(f"{config}: {error}") from error


@pytest.mark.slow
def test_every_kind_learns_the_same_sharded() -> None:
    on_two_processes(check_all)
