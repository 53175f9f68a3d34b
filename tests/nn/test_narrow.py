"""The `narrow` kind, by hand: who sleeps, what merging wakes, what is refused."""

from __future__ import annotations

import pytest
import torch

from fastffn import DenseConfig, DenseFFN, NarrowConfig, NarrowFFN, build
from fastffn.errors import ConfigError


def test_the_largest_neurons_stay_awake_in_their_order() -> None:
    dense = DenseFFN(DenseConfig(d_model=2, d_hidden=4))
    with torch.no_grad():
        dense.up.weight.copy_(torch.tensor([[1.0, 0], [3, 4], [0, 2], [0, 0.1]]))
        dense.down.weight.copy_(torch.tensor([[1.0, 0.1, 3, 100], [0, 0, 4, 0]]))
        dense.up.bias.copy_(torch.arange(4.0))
    # Sizes 1, 0.5, 10, 10.
    ffn = NarrowFFN.from_dense(dense, NarrowConfig(width=2))
    assert ffn.up.bias.tolist() == [2, 3]
    assert torch.equal(ffn.down.weight, dense.down.weight[:, 2:])
    assert torch.equal(ffn.asleep.up.weight, dense.up.weight[:2])
    assert ffn.asleep.up.bias.tolist() == [0, 1]
    assert set(dict(ffn.named_parameters())) == {"up.weight", "up.bias", "down.weight", "down.bias"}


def test_merging_wakes_and_changes_nothing() -> None:
    ffn = build(NarrowConfig(d_model=6, d_hidden=20, width=3))
    merged = ffn.merge()
    x = torch.randn(5, 6)
    torch.testing.assert_close(merged(x), ffn(x))
    assert merged.up.weight.shape == (20, 6)
    assert torch.equal(merged.up.weight[3:], ffn.asleep.up.weight)
    assert not merged.down.weight[:, 3:].any()
    merged(x).square().sum().backward()
    # What was asleep begins to learn: first the way out.
    assert merged.down.weight.grad[:, 3:].any() and not merged.up.weight.grad[3:].any()


def test_dense_with_the_rest_silenced() -> None:
    dense = DenseFFN(DenseConfig(d_model=6, d_hidden=8, gated=True, activation="silu"))
    ffn = NarrowFFN.from_dense(dense, NarrowConfig(width=5))
    awake = {tuple(row) for row in ffn.up.weight.tolist()}
    with torch.no_grad():
        for neuron, row in enumerate(dense.up.weight.tolist()):
            if tuple(row) not in awake:
                dense.down.weight[:, neuron] = 0
    x = torch.randn(4, 6)
    torch.testing.assert_close(ffn(x), dense(x))


@pytest.mark.parametrize("width", [0, 16, -1, 2.5])
def test_widths_that_make_no_sense(width) -> None:
    with pytest.raises(ConfigError, match=rf"width is {width}.*below d_hidden \(16\)"):
        build("narrow", d_model=4, width=width)
