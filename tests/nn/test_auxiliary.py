from __future__ import annotations

import pytest
import torch
from torch import nn

from fastffn import DenseConfig, DenseFFN, LeafTreeConfig, LeafTreeFFN, MoEConfig, MoEFFN, auxiliary_loss


def test_zero_for_models_that_ask_for_nothing() -> None:
    for model in (nn.Sequential(), DenseFFN(DenseConfig(d_model=4)), LeafTreeFFN(LeafTreeConfig(d_model=4))):
        model(torch.randn(2, 4))
        loss = auxiliary_loss(model)
        assert loss.shape == () and loss.item() == 0
        (torch.ones((), requires_grad=True) + loss).backward()


def test_sum_over_the_modules_of_a_model() -> None:
    tree = LeafTreeFFN(LeafTreeConfig(d_model=4, depth=1, hardening_weight=2.0))
    experts = MoEFFN(MoEConfig(d_model=4, balance_weight=0.3))
    model = nn.Sequential(tree, nn.Sequential(experts), nn.Linear(4, 4))
    model(torch.randn(9, 4))
    torch.testing.assert_close(auxiliary_loss(model), auxiliary_loss(tree) + auxiliary_loss(experts))
    assert auxiliary_loss(tree).item() > 0 and auxiliary_loss(experts).item() > 0
    assert torch.equal(auxiliary_loss(model), auxiliary_loss(model))  # collecting does not use it up


@pytest.mark.parametrize(
    "make",
    [
        lambda: LeafTreeFFN(LeafTreeConfig(d_model=4, hardening_weight=1.0)),
        lambda: MoEFFN(MoEConfig(d_model=4)),
    ],
    ids=["leaf_tree", "moe"],
)
def test_the_last_pass_counts(make) -> None:
    ffn = make()
    ffn(torch.randn(9, 4))
    first = auxiliary_loss(ffn)
    ffn(torch.randn(9, 4))
    assert auxiliary_loss(ffn).item() not in (0.0, first.item())
    ffn.eval()(torch.randn(9, 4))
    assert auxiliary_loss(ffn).item() == 0
