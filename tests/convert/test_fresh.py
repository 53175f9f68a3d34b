"""Models with fresh weights."""

from __future__ import annotations

import pytest
import torch

from fastffn.convert.architectures import ARCHITECTURES
from fastffn.convert.fresh import ModelShape, fresh_model
from fastffn.nn import LowRankConfig, NarrowConfig


def shape(**fields) -> ModelShape:
    return ModelShape(layers=2, d_model=64, heads=2, sequence=16, vocabulary=300, **fields)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_weights_have_the_spread_asked_for(architecture) -> None:
    usual = fresh_model(shape(architecture=architecture)).state_dict()
    wide = fresh_model(shape(architecture=architecture, initializer_range=0.06)).state_dict()
    matrices = [name for name, value in usual.items() if value.ndim == 2]
    # The same random numbers, thrice as large; biases and norms as ever.
    for name, value in usual.items():
        torch.testing.assert_close(wide[name], 3 * value if name in matrices else value, rtol=1e-5, atol=1e-8)
    assert matrices and abs(wide[matrices[0]].std() - 0.06) < 0.002


def test_factors_and_neurons_asleep_start_from_weights_of_that_spread() -> None:
    """What stage 1 starts from is made of the dense start, whatever its spread."""
    dense = fresh_model(shape(initializer_range=0.1)).transformer.h[0].mlp.c_fc.weight.T
    ffn = fresh_model(shape(initializer_range=0.1), LowRankConfig(rank=63)).transformer.h[0].mlp
    # All but the least of 64 directions.
    assert (ffn.up.b.weight @ ffn.up.a.weight - dense).norm() < 0.1 * dense.norm()
    narrow = fresh_model(shape(initializer_range=0.1), NarrowConfig(width=64)).transformer.h[0].mlp
    rows = torch.cat((narrow.up.weight, narrow.asleep.up.weight))
    torch.testing.assert_close(rows.square().mean(), dense.square().mean())
