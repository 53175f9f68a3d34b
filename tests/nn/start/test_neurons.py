from __future__ import annotations

import pytest
import torch

from fastffn import DenseConfig
from fastffn.nn import DenseFFN
from fastffn.nn.start.neurons import balanced_groups, by_use, columns, contributions, copy_neurons


def planted(tokens: int, groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contributions of neurons, each group of which works on its own part of the tokens, and the group of each."""
    owner = torch.arange(groups).repeat(size)[torch.randperm(groups * size)]
    topic = torch.randint(groups, (tokens,))
    working = (topic[:, None] == owner).float()
    # Some do a hundred times as much as others.
    return (working + 0.2 * torch.rand(tokens, groups * size)) * torch.logspace(-1, 1, groups * size), owner


@pytest.mark.parametrize(("groups", "size"), [(1, 5), (4, 6), (8, 16)])
def test_groups_work_on_the_same_tokens(groups: int, size: int) -> None:
    contribution, owner = planted(600, groups, size)
    found = balanced_groups(contribution, groups)
    assert found.shape == (groups, size)
    assert sorted(found.flatten().tolist()) == list(range(groups * size))
    assert torch.equal(found, found.sort(1).values)
    # k-means may mix two groups up where it starts badly.
    pure = torch.stack([owner[group].bincount(minlength=groups).max() for group in found])
    assert pure.sum() >= 0.75 * groups * size
    assert torch.equal(found, balanced_groups(contribution, groups))


@pytest.mark.parametrize("tokens", [1, 2, 50])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e20])
def test_neurons_that_are_all_alike_are_shared_out(tokens: int, value: float) -> None:
    found = balanced_groups(torch.full((tokens, 12), value), 4)
    assert found.shape == (4, 3) and len(found.unique()) == 12


def test_contributions_are_what_a_neuron_adds() -> None:
    dense = DenseFFN(DenseConfig(d_model=6, d_hidden=9, d_out=4))
    x = torch.randn(5, 6)
    hidden = dense.hidden(x)
    added = torch.stack([hidden[:, [n]] * dense.down.weight[:, n] for n in range(9)], 1)  # [S, H, O]
    torch.testing.assert_close(contributions(dense, hidden), added.norm(dim=2))
    order = by_use(added.norm(dim=2))
    torch.testing.assert_close(order, added.square().sum((0, 2)).argsort(descending=True))


def test_a_column_that_is_not_there_is_zero() -> None:
    matrix = torch.randn(3, 4)
    found = columns(matrix, torch.tensor([[2, 4], [0, 2]]))
    assert torch.equal(found[:, 0, 0], matrix[:, 2]) and not found[:, 0, 1].any()
    assert torch.equal(found[:, 1], matrix[:, [0, 2]])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_copied_neurons_add_what_they_added(gated: bool, bias: bool) -> None:
    dense = DenseFFN(DenseConfig(d_model=6, d_hidden=9, gated=gated, bias=bias))
    # A part with biases can hold neurons without.
    part = DenseFFN(DenseConfig(d_model=6, d_hidden=3, gated=gated))
    with torch.no_grad():
        copy_neurons(dense, part, torch.tensor([7, 0, 4]))
    x = torch.randn(5, 6)
    torch.testing.assert_close(part(x), dense.hidden(x)[:, [7, 0, 4]] @ dense.down.weight[:, [7, 0, 4]].T)
