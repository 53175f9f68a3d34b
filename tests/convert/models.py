"""Tiny models of every family with random weights, and every kind in a size that fits them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastffn
from fastffn.convert.api import check_kind, place_fresh
from fastffn.convert.match import family_ffns, family_of
from fastffn.errors import ConfigError, KindError
from fastffn.nn import FFNConfig
from fastffn.registry import get_kind, kinds

VOCABULARY = 97
D, H = 24, 36

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": H,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": H,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "n_embd": D,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": H,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What people load: name -> (class, configuration class, settings).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert": ("BertModel", "BertConfig", _BERT),
    "roberta-classifier": ("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
}
# The rest of each family: only the layout of their FFNs is tested.
KIN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", _BERT),
    "camembert": ("CamembertForMaskedLM", "CamembertConfig", _BERT),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", _BERT | {"embedding_size": 16, "hidden_act": "relu"}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"mlp_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 8}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", _LLAMA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _LLAMA | {"head_dim": 8}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _LLAMA),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _LLAMA),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "ministral": ("MinistralForCausalLM", "MinistralConfig", _LLAMA | {"head_dim": 8}),
}
CAUSAL = ["gpt2", "llama-tied", "qwen2", "mistral"]

# Options with which a kind fits these widths.
OPTIONS: dict[str, dict[str, Any]] = {
    "block": {"blocks": 2},
    "leaf_tree": {"depth": 2},
    "low_rank": {"rank": 5},
    "moe": {"experts": 4, "active": 2, "shared": 4},
    "neuron_tree": {"depth": 2, "trees": 3},
}
KINDS = list(kinds())
# Kinds that cannot start from weights alone.
NEED_TOKENS = {"leaf_tree", "moe", "neuron_tree"}


def make(name: str) -> Any:
    """The model called `name`, in evaluation mode, none of its biases zero."""
    import transformers

    architecture, configuration, settings = (MODELS | KIN)[name]
    torch.manual_seed(1)
    model = getattr(transformers, architecture)(getattr(transformers, configuration)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def config_of(kind: str) -> FFNConfig:
    return get_kind(kind).config(**OPTIONS.get(kind, {}))


def put(model: Any, kind: str) -> Any:
    """The model with FFNs of a kind, made from its own where the kind can, fresh ones elsewhere."""
    config = config_of(kind)
    skip_unless_it_fits(model, kind)
    try:
        check_kind(config)
    except KindError:
        place_fresh(model, config)
    else:
        fastffn.convert(model, config, calibration=[tokens(4)])
    return model.eval()


def skip_unless_convertible(kind: str) -> None:
    try:
        check_kind(config_of(kind))
    except KindError as error:
        pytest.skip(str(error))


def skip_unless_it_fits(model: Any, kind: str) -> None:
    family = family_of(model.config)
    path, _ = next(family_ffns(model, family))
    try:
        config_of(kind).fitted_to(family.dense_config(model, path))
    except ConfigError as error:
        pytest.skip(str(error))


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(7))


def first_output(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    output: torch.Tensor = model(**(inputs or {"input_ids": tokens()}))[0]
    return output.detach()
