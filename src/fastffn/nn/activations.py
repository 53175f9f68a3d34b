"""Activations by the names that transformers' ACT2FN gives them, so that conversion can keep the model's own.

`gelu_new`, the tanh form that GPT-2 uses, is computed here by torch's fused kernel: the same function, rounded
differently in the last bit, several times faster than the formula spelled out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from fastffn.errors import ConfigError, did_you_mean

Activation = Callable[[torch.Tensor], torch.Tensor]

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu_squared,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": torch.nn.Identity(),
}


def get_activation(name: str) -> Activation:
    """The activation called `name`.

    Raises:
        ConfigError: no activation has that name.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"Unknown activation '{name}'; known are {', '.join(ACTIVATIONS)}.{did_you_mean(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
