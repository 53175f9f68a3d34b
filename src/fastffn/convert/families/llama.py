"""Llama and its kin: a gated `mlp` of `gate_proj`, `up_proj` and `down_proj`, with biases if `config.mlp_bias`."""

from __future__ import annotations

from fastffn.convert.match import Family, ModelTensor


class LlamaFamily(Family):
    """See `Family`."""

    ffn_classes = {  # noqa: RUF012  (declared in the base class)
        "gemma": "GemmaMLP",
        "granite": "GraniteMLP",
        "llama": "LlamaMLP",
        "ministral": "MinistralMLP",
        "mistral": "MistralMLP",
        "olmo2": "Olmo2MLP",
        "qwen2": "Qwen2MLP",
        "qwen3": "Qwen3MLP",
        "smollm3": "SmolLM3MLP",
    }
    tensors = {  # noqa: RUF012
        f"{linear}.{part}": ModelTensor(f"{linear}_proj.{part}")
        for linear in ("up", "gate", "down")
        for part in ("weight", "bias")
    }


FAMILY = LlamaFamily()
