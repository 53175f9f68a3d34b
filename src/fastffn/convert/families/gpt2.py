"""GPT-2: `mlp` holds `c_fc` and `c_proj`, transformers' Conv1D, whose weights are `[in, out]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastffn.convert.match import Family, ModelTensor
from fastffn.nn import DenseConfig


class GPT2Family(Family):
    """See `Family`."""

    model_types = ("gpt2",)
    ffn_class = "GPT2MLP"
    tensors = {  # noqa: RUF012  (declared in the base class)
        "up.weight": ModelTensor("c_fc.weight", transposed=True),
        "up.bias": ModelTensor("c_fc.bias"),
        "down.weight": ModelTensor("c_proj.weight", transposed=True),
        "down.bias": ModelTensor("c_proj.bias"),
    }

    def dense_config(self, ffn: Any, model_config: Any) -> DenseConfig:
        """See `Family.dense_config`."""
        d_model, d_hidden = ffn.c_fc.weight.shape
        return DenseConfig(
            d_model=d_model,
            d_hidden=d_hidden,
            activation=model_config.activation_function,
            dropout=model_config.resid_pdrop,
        )

    def empty_ffn(self, config: DenseConfig, model_config: Any) -> nn.Module:
        """See `Family.empty_ffn`."""
        from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

        with torch.device("meta"):
            ffn: nn.Module = GPT2MLP(config.d_hidden, model_config)
        return ffn


FAMILY = GPT2Family()
