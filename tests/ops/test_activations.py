from __future__ import annotations

import pytest
import torch

from fastffn.errors import ConfigError
from fastffn.ops.activations import ACTIVATIONS, get_activation, get_activation_backward


@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_is_the_derivative(name: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(200, dtype=dtype)).requires_grad_()
    gradient = torch.randn(200, dtype=dtype)
    (expected,) = torch.autograd.grad(get_activation(name)(x), x, gradient)
    torch.testing.assert_close(get_activation_backward(name)(gradient, x.detach()), expected)


def test_unknown_activation_has_no_backward() -> None:
    with pytest.raises(ConfigError, match=r"'geluu'.*Did you mean 'gelu'"):
        get_activation_backward("geluu")
