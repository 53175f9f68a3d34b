"""A GPT-2 with fresh weights, its FFNs dense or of another kind; and the FLOPs of a training step of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastffn.convert.api import convert, place_fresh
from fastffn.convert.loading import read_config
from fastffn.convert.match import after_first, fastffn_modules
from fastffn.errors import CheckpointError
from fastffn.measure.flops import StepBound, layer_flops, step_flops
from fastffn.nn import FFNConfig


@dataclass(frozen=True, kw_only=True)
class GPT2Shape:
    """Widths of a GPT-2: `d_hidden` None means 4 d_model; `dropout` is that of embeddings, attention, residuals."""

    layers: int
    d_model: int
    heads: int
    sequence: int
    vocabulary: int
    d_hidden: int | None = None
    activation: str = "gelu_pytorch_tanh"
    dropout: float = 0.0

    @classmethod
    def of_checkpoint(cls, directory: Path) -> GPT2Shape:
        """The widths of the dense GPT-2 in a directory.

        Raises:
            CheckpointError: there is no checkpoint, it is none of a GPT-2, or its FFNs are not dense.
        """
        values = read_config(directory)
        if values.get("model_type") != "gpt2":
            raise CheckpointError(
                f"{directory} holds a model of type {values.get('model_type')!r}; training can start from a 'gpt2'."
            )
        if "quantization_config" in values:
            raise CheckpointError(
                f"The FFNs of {directory} are not dense. Make them so with `fastffn merge {directory} DIRECTORY`."
            )
        from transformers import GPT2Config

        config: Any = GPT2Config.from_dict(values)
        return cls(
            layers=config.n_layer,
            d_model=config.n_embd,
            heads=config.n_head,
            d_hidden=config.n_inner,
            sequence=config.n_positions,
            vocabulary=config.vocab_size,
            activation=config.activation_function,
            dropout=config.resid_pdrop,
        )

    def model_config(self, end_of_text: int = 0) -> Any:
        """The transformers configuration."""
        from transformers import GPT2Config

        return GPT2Config(
            vocab_size=self.vocabulary,
            n_positions=self.sequence,
            n_embd=self.d_model,
            n_layer=self.layers,
            n_head=self.heads,
            n_inner=self.d_hidden,
            activation_function=self.activation,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            use_cache=False,  # training would copy keys and values for nothing; generate() does not read this
        )

    @property
    def ffn_flops_per_token(self) -> int:
        """FLOPs of the dense FFNs' matrix products, forward and backward."""
        # Three products (forward, two gradients) of two matrices, two FLOPs a multiply-add.
        return 3 * 2 * 2 * self.layers * self.d_model * (self.d_hidden or 4 * self.d_model)


def fresh_gpt2(
    shape: GPT2Shape, ffn: FFNConfig | None = None, *, seed: int = 0, end_of_text: int = 0, dense_layers: int = 0
) -> Any:
    """A model with fresh weights: for a seed the same dense start, whatever becomes of its FFNs.

    Args:
        shape: its widths.
        ffn: kind to put in the place of the dense FFNs, None to keep them.
        seed: of all random numbers.
        end_of_text: number of the token that ends a document.
        dense_layers: first FFNs that stay dense all the same.

    Returns:
        A `transformers.GPT2LMHeadModel`.
    """
    from transformers import GPT2LMHeadModel, set_seed

    set_seed(seed)
    model = GPT2LMHeadModel(shape.model_config(end_of_text))
    if ffn is not None:
        place_fresh(model, ffn, filter=after_first(model, dense_layers))
    return model


def started_gpt2(
    directory: Path,
    ffn: FFNConfig | None = None,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    dense_layers: int = 0,
) -> Any:
    """A GPT-2 with the weights of a checkpoint; arguments as of `fresh_gpt2`."""
    from transformers import GPT2LMHeadModel, set_seed

    set_seed(seed)
    model: Any = GPT2LMHeadModel.from_pretrained(
        directory, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, dtype=torch.float32
    )
    model.config.use_cache = False
    if ffn is not None:
        convert(model, ffn, filter=after_first(model, dense_layers))
    return model.train()


def step_bound(shape: GPT2Shape, ffn: FFNConfig, dense_layers: int = 0) -> StepBound:
    """The FLOPs of a training step on one sequence: dense, with `ffn` after the first layers, and without FFNs."""
    with torch.device("meta"):
        dense, other = fresh_gpt2(shape), fresh_gpt2(shape, ffn, dense_layers=dense_layers)
    flops = step_flops(dense, shape.sequence)
    without_ffn = flops - shape.sequence * shape.ffn_flops_per_token
    # Counted by themselves: in a whole model their batched products could not be told from those of attention.
    ffns = sum(layer_flops(module, shape.sequence, shape.d_model) for _, module in fastffn_modules(other))
    ffns += shape.sequence * shape.ffn_flops_per_token * dense_layers // shape.layers
    return StepBound(flops, without_ffn + ffns, without_ffn)
