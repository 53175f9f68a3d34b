from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastffn import LeafTreeConfig, LeafTreeFFN
from fastffn.errors import ConfigError
from fastffn.nn.leaf_updates import LeafUpdates


def tree(gated: bool = False) -> LeafTreeFFN:
    return LeafTreeFFN(LeafTreeConfig(d_model=4, depth=2, leaf_width=3, decisions="hard", gated=gated))


def leaf_parameters(ffn: LeafTreeFFN) -> list[nn.Parameter]:
    return [ffn.get_parameter(name) for name in leaf_tensors(ffn)]


def leaf_tensors(ffn: LeafTreeFFN) -> list[str]:
    return [name for name, _ in ffn.named_parameters() if name.startswith("leaf_")]


def backward(ffn: LeafTreeFFN, x: torch.Tensor) -> None:
    ffn(x).square().mean().backward()


def test_same_effect_as_the_published_optimizer() -> None:
    # Without momentum: theirs starts the momentum of waiting leaves with the gradient of too few samples.
    fff = pytest.importorskip("fastfeedforward")
    ours, theirs = tree(), tree()
    theirs.load_state_dict(ours.state_dict())
    samples = 12
    optimizer = torch.optim.SGD(leaf_parameters(ours), lr=0.3)
    LeafUpdates(optimizer, ours, samples)
    usage = torch.zeros(4)
    group = {"params": leaf_parameters(theirs), "usage": usage, "local_batch_size": samples}
    local = fff.optim.LocalSGD([group], lr=0.3)
    updated, waited = 0, 0
    for step in range(12):
        x = torch.randn(10, 4, generator=torch.Generator().manual_seed(step))
        before = ours.leaf_up_bias.detach().clone()
        optimizer.zero_grad()
        backward(ours, x)
        optimizer.step()
        local.zero_grad()
        backward(theirs, x)
        usage += torch.bincount(theirs.path(x).leaf, minlength=4)
        local.step()
        for one, other in zip(leaf_parameters(ours), leaf_parameters(theirs), strict=True):
            torch.testing.assert_close(one, other)
        changed = (ours.leaf_up_bias != before).any(1)
        updated, waited = updated + int(changed.sum()), waited + int((~changed).sum())
    assert updated > 4 and waited > 4


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_waiting_leaves_keep_values_and_states(make, gated) -> None:
    ffn = tree(gated)
    optimizer = make(ffn.parameters(), lr=0.1)
    LeafUpdates(optimizer, ffn, samples=10)
    with torch.no_grad():  # right, then left: leaf 2
        ffn.node_weight.zero_()
        ffn.node_bias.copy_(torch.tensor([1.0, 1.0, -1.0]))
    start = copy.deepcopy(ffn)
    for step in range(3):
        optimizer.zero_grad()
        backward(ffn, torch.randn(5, 4))
        optimizer.step()
        for name in leaf_tensors(ffn):
            moved = (ffn.get_parameter(name) != start.get_parameter(name)).flatten(1).any(1).tolist()
            assert moved == [False, False, step >= 1, False], (step, name)
            for value in optimizer.state[ffn.get_parameter(name)].values():
                if value.dim():
                    assert not value[[0, 1, 3]].any()


def test_remove() -> None:
    ffn = tree()
    optimizer = torch.optim.SGD(ffn.parameters(), lr=0.1)
    LeafUpdates(optimizer, ffn, samples=10**6).remove()
    before = ffn.leaf_up_bias.detach().clone()
    backward(ffn, torch.randn(50, 4))
    optimizer.step()
    assert not torch.equal(ffn.leaf_up_bias, before)


def test_bad_input() -> None:
    ffn = tree()
    optimizer = torch.optim.SGD(ffn.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="samples is 0"):
        LeafUpdates(optimizer, ffn, 0)
    with pytest.raises(ConfigError, match="Linear holds no leaf tree"):
        LeafUpdates(optimizer, nn.Linear(2, 2), 4)
