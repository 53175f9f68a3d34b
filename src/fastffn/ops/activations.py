"""Activations by the names that transformers' ACT2FN gives them, so that conversion can keep the model's own.

`gelu_new`, the tanh form that GPT-2 uses, is computed here by torch's fused kernel: the same function, rounded
differently in the last bit, several times faster than the formula spelled out.

Each comes with its derivative, because the backward pass of an opaque operator cannot ask autograd.
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


# The derivatives are the operators that autograd itself calls; `(gradient, x) -> gradient * f'(x)`.
ActivationBackward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_aten = torch.ops.aten


def _gelu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _aten.gelu_backward(gradient, x)
    return result


def _gelu_tanh_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _aten.gelu_backward(gradient, x, approximate="tanh")
    return result


def _quick_gelu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gradient * gate * (1 + 1.702 * x * (1 - gate))


def _relu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _aten.threshold_backward(gradient, x, 0)
    return result


def _relu_squared_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 2 * gradient * F.relu(x)


def _silu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _aten.silu_backward(gradient, x)
    return result


def _tanh_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _aten.tanh_backward(gradient, torch.tanh(x))
    return result


def _sigmoid_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _aten.sigmoid_backward(gradient, torch.sigmoid(x))
    return result


def _linear_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gradient


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

_BACKWARD: dict[str, ActivationBackward] = {
    "gelu": _gelu_backward,
    "gelu_new": _gelu_tanh_backward,
    "gelu_pytorch_tanh": _gelu_tanh_backward,
    "gelu_fast": _gelu_tanh_backward,
    "quick_gelu": _quick_gelu_backward,
    "relu": _relu_backward,
    "relu2": _relu_squared_backward,
    "silu": _silu_backward,
    "swish": _silu_backward,
    "tanh": _tanh_backward,
    "sigmoid": _sigmoid_backward,
    "linear": _linear_backward,
}


# Names of one function, by the name that kernels know it by.
_SAME = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}


def plain_name(name: str) -> str:
    """The name by which kernels know the activation that `ACTIVATIONS` calls `name`."""
    return _SAME.get(name, name)


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


def get_activation_backward(name: str) -> ActivationBackward:
    """`(gradient, x) -> gradient * f'(x)` for the activation f called `name`.

    Raises:
        ConfigError: no activation has that name.
    """
    get_activation(name)
    return _BACKWARD[name]
