from __future__ import annotations

import pytest
import torch

from fastffn import DenseConfig, NeuronTreeConfig, NeuronTreeFFN
from fastffn.nn import DenseFFN
from fastffn.nn.start import neuron_tree as start

D = 12


def like_a_tree() -> DenseFFN:
    """Sharp steps along three directions: what the two sides of a decision put out differs."""
    dense = DenseFFN(DenseConfig(d_model=D, d_hidden=12, d_out=7))
    with torch.no_grad():
        directions = torch.linalg.qr(torch.randn(D, 3)).Q.T
        # gelu(20 s + 10) - gelu(20 s - 10) is a step from 0 to 20 at s = 0.
        dense.up.weight.zero_()
        dense.up.bias.zero_()
        dense.up.weight[:6] = 20 * directions.repeat(2, 1)
        dense.up.bias[:3], dense.up.bias[3:6] = 10.0, -10.0
        heights = torch.randn(7, 3) / 20
        dense.down.weight[:, :3], dense.down.weight[:, 3:6] = heights, -heights
    return dense


def error(ffn: NeuronTreeFFN, dense: DenseFFN, x: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = dense(x)
        return float((ffn.eval()(x) - wanted).square().mean() / wanted.var(0).mean())


def test_explains_most_of_what_a_tree_can(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = like_a_tree(), torch.randn(5000, D)
    config = NeuronTreeConfig(depth=3, trees=4)
    taught = error(NeuronTreeFFN.from_dense(dense, config, x[:4000]), dense, x[4000:])
    assert taught < 0.15
    monkeypatch.setattr(start, "_train", lambda *_: None)
    grown = error(NeuronTreeFFN.from_dense(dense, config, x[:4000]), dense, x[4000:])
    assert taught < 0.5 * grown < 0.4


def test_growing_helps_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = like_a_tree(), torch.randn(5000, D)
    config = NeuronTreeConfig(depth=3, trees=4)
    taught = error(NeuronTreeFFN.from_dense(dense, config, x[:4000]), dense, x[4000:])
    monkeypatch.setattr(start, "_grow", lambda ffn, tree, inputs, left, split: left)
    assert taught < 0.8 * error(NeuronTreeFFN.from_dense(dense, config, x[:4000]), dense, x[4000:])


def test_depth_0_and_a_shared_part_take_the_neurons_that_do_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_train", lambda *_: None)
    dense, x = like_a_tree(), torch.randn(2000, D)
    ffn = NeuronTreeFFN.from_dense(dense, NeuronTreeConfig(depth=0, trees=2, shared=6), x)
    torch.testing.assert_close(ffn.shared.up.weight.sort(0).values, dense.up.weight[:6].sort(0).values)
    assert error(ffn, dense, x) < 1e-3


def test_neurons_without_tokens_can_learn() -> None:
    """Three tokens for 31 neurons: the others keep a direction, in which a gradient finds them."""
    dense = like_a_tree()
    ffn = NeuronTreeFFN.from_dense(dense, NeuronTreeConfig(depth=4), torch.randn(3, D))
    assert ffn.w_in.any(2).all()
    x = torch.randn(2000, D)
    (ffn(x) - dense(x)).square().mean().backward()
    assert int(ffn.w_out.grad.any(2).sum()) > 10
