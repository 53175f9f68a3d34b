"""Models that training can start afresh: transformers' classes, and what their configurations call a width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastffn.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of them.

    Attributes:
        name: for people.
        config, model: names of the classes in transformers.
        fields: for each width of a `ModelShape`, the configuration's field.
        dropouts: fields that hold a dropout.
        ends: fields that hold the number of the token that ends a document.
        fixed: fields that are always the same.
        masked: whether it predicts masked tokens, seeing those on both sides; if not, the next one.
    """

    name: str
    config: str
    model: str
    fields: Mapping[str, str]
    dropouts: tuple[str, ...]
    ends: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False

    def config_class(self) -> Any:
        """The configuration's class."""
        import transformers

        return getattr(transformers, self.config)

    def model_class(self) -> Any:
        """The language model's class."""
        import transformers

        return getattr(transformers, self.model)


DEFAULT = "gpt2"
# By `config.model_type`. Another one is an entry here, once its FFNs have a file in `families`.
ARCHITECTURES = {
    "gpt2": Architecture(
        name="GPT-2",
        config="GPT2Config",
        model="GPT2LMHeadModel",
        fields={
            "layers": "n_layer",
            "d_model": "n_embd",
            "heads": "n_head",
            "d_hidden": "n_inner",
            "sequence": "n_positions",
            "vocabulary": "vocab_size",
            "activation": "activation_function",
        },
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        ends=("bos_token_id", "eos_token_id"),
        # Training would copy keys and values for nothing; generate() does not read this.
        fixed={"use_cache": False},
    ),
    "bert": Architecture(
        name="BERT",
        config="BertConfig",
        model="BertForMaskedLM",
        fields={
            "layers": "num_hidden_layers",
            "d_model": "hidden_size",
            "heads": "num_attention_heads",
            "d_hidden": "intermediate_size",
            "sequence": "max_position_embeddings",
            "vocabulary": "vocab_size",
            "activation": "hidden_act",
        },
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        # Blocks are full: no token is padding, whose embedding would not be trained.
        fixed={"pad_token_id": None},
        masked=True,
    ),
}


def get_architecture(name: str | None) -> Architecture:
    """The architecture of that name, the default one for None.

    Raises:
        ConfigError: there is none.
    """
    name = DEFAULT if name is None else name
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"Unknown architecture '{name}'; there are {', '.join(ARCHITECTURES)}.{did_you_mean(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]
