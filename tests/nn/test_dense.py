from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastffn import DenseConfig, DenseFFN
from fastffn.errors import ConfigError
from fastffn.ops.activations import ACTIVATIONS, get_activation


def test_formula() -> None:
    ffn = DenseFFN(DenseConfig(d_model=6, d_hidden=10, d_out=4))
    x = torch.randn(3, 6)
    hidden = F.gelu(x @ ffn.up.weight.T + ffn.up.bias)
    torch.testing.assert_close(ffn(x), hidden @ ffn.down.weight.T + ffn.down.bias)


def test_gated_formula() -> None:
    ffn = DenseFFN(DenseConfig(d_model=6, d_hidden=10, gated=True, bias=False, activation="silu"))
    x = torch.randn(3, 6)
    hidden = F.silu(x @ ffn.gate.weight.T) * (x @ ffn.up.weight.T)
    torch.testing.assert_close(ffn(x), hidden @ ffn.down.weight.T)


def test_state_dict_is_the_documented_format() -> None:
    shapes = {k: tuple(v.shape) for k, v in DenseFFN(DenseConfig(d_model=6, gated=True)).state_dict().items()}
    assert shapes == {
        "up.weight": (24, 6),
        "up.bias": (24,),
        "gate.weight": (24, 6),
        "gate.bias": (24,),
        "down.weight": (6, 24),
        "down.bias": (6,),
    }


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name: str) -> None:
    ACT2FN = pytest.importorskip("transformers.activations").ACT2FN
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)
    ours, theirs = get_activation(name)(x), ACT2FN[name](x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if name == "gelu_fast" else 1e-12)


def test_unknown_activation_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'silu'"):
        get_activation("sillu")
