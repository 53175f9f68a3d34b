"""GPT-2: `mlp` holds `c_fc` and `c_proj`, transformers' Conv1D, whose weights are `[in, out]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastffn.convert.match import Family, ModelTensor
from fastffn.nn import DenseConfig


class GPT2Family(Family):
    """See `Family`."""

    ffn_classes = {"gpt2": "GPT2MLP"}  # noqa: RUF012  (declared in the base class)
    tensors = {  # noqa: RUF012
        "up.weight": ModelTensor("c_fc.weight", transposed=True),
        "up.bias": ModelTensor("c_fc.bias"),
        "down.weight": ModelTensor("c_proj.weight", transposed=True),
        "down.bias": ModelTensor("c_proj.bias"),
    }
    activation = "activation_function"
    dropout = "resid_pdrop"

    def own_ffn(self, ffn_class: Callable[..., nn.Module], config: DenseConfig, model_config: Any) -> nn.Module:
        """See `Family.own_ffn`."""
        return ffn_class(config.d_hidden, model_config)


FAMILY = GPT2Family()
