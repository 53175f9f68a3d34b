"""A language model with fresh weights, its FFNs dense or of another kind; and the FLOPs of a training step of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastffn.convert.api import convert, place_fresh
from fastffn.convert.architectures import ARCHITECTURES, DEFAULT, get_architecture
from fastffn.convert.loading import load_model, read_config
from fastffn.convert.match import after_first, fastffn_modules
from fastffn.errors import CheckpointError
from fastffn.measure.flops import StepBound, layer_flops, step_flops
from fastffn.nn import FFNConfig


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What fixes a model that starts afresh.

    `d_hidden` None means 4 d_model; `dropout` is that of embeddings, attention, residuals; `initializer_range`, the
    standard deviation of the weights it starts with, None means transformers' own.
    """

    architecture: str = DEFAULT
    layers: int
    d_model: int
    heads: int
    sequence: int
    vocabulary: int
    d_hidden: int | None = None
    activation: str = "gelu_pytorch_tanh"
    dropout: float = 0.0
    initializer_range: float | None = None

    @classmethod
    def of_checkpoint(cls, directory: Path) -> ModelShape:
        """The shape of the dense model in a directory; what it once started with is not read.

        Raises:
            CheckpointError: there is no checkpoint, it is of no known architecture, or its FFNs are not dense.
        """
        values = read_config(directory)
        name = values.get("model_type")
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"{directory} holds a model of type {name!r}; training can start from {' or '.join(ARCHITECTURES)}."
            )
        if "quantization_config" in values:
            raise CheckpointError(
                f"The FFNs of {directory} are not dense. Make them so with `fastffn merge {directory} DIRECTORY`."
            )
        architecture = ARCHITECTURES[name]
        config: Any = architecture.config_class().from_dict(values)
        if architecture.masked and config.is_decoder:
            raise CheckpointError(
                f"{directory} holds a {architecture.name} whose tokens see those before them only (is_decoder); "
                "training on masked tokens needs those on both sides."
            )
        found = {ours: getattr(config, theirs) for ours, theirs in architecture.fields.items()}
        return cls(architecture=name, dropout=getattr(config, architecture.dropouts[0]), **found)

    def model_config(self, end_of_text: int = 0) -> Any:
        """The transformers configuration."""
        architecture = get_architecture(self.architecture)
        return architecture.config_class()(
            **{theirs: getattr(self, ours) for ours, theirs in architecture.fields.items() if ours != "d_hidden"},
            **{architecture.fields["d_hidden"]: self.d_hidden or 4 * self.d_model},
            **dict.fromkeys(architecture.dropouts, self.dropout),
            **dict.fromkeys(architecture.ends, end_of_text),
            **({} if self.initializer_range is None else {"initializer_range": self.initializer_range}),
            **architecture.fixed,
        )

    @property
    def ffn_flops_per_token(self) -> int:
        """FLOPs of the dense FFNs' matrix products, forward and backward."""
        # Three products (forward, two gradients) of two matrices, two FLOPs a multiply-add.
        return 3 * 2 * 2 * self.layers * self.d_model * (self.d_hidden or 4 * self.d_model)


def fresh_model(
    shape: ModelShape, ffn: FFNConfig | None = None, *, seed: int = 0, end_of_text: int = 0, dense_layers: int = 0
) -> Any:
    """A model with fresh weights: for a seed the same dense start, whatever becomes of its FFNs.

    Args:
        shape: architecture and widths.
        ffn: kind to put in the place of the dense FFNs, None to keep them.
        seed: of all random numbers.
        end_of_text: number of the token that ends a document.
        dense_layers: first FFNs that stay dense all the same.

    Returns:
        A language model of transformers, such as `GPT2LMHeadModel`.
    """
    from transformers import set_seed

    set_seed(seed)
    model = get_architecture(shape.architecture).model_class()(shape.model_config(end_of_text))
    if ffn is not None:
        place_fresh(model, ffn, filter=after_first(model, dense_layers))
    return model


def trained_model(directory: Path, **options: Any) -> Any:
    """The model of a run's checkpoint, or of one that a run starts from, ready to be trained on.

    Args:
        directory: the checkpoint's, FFNs dense or not.
        options: of `from_pretrained`.
    """
    architecture = get_architecture(read_config(directory).get("model_type"))
    return load_model(architecture.model_class(), directory, **architecture.fixed, **options)


def started_model(
    directory: Path,
    ffn: FFNConfig | None = None,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    dense_layers: int = 0,
) -> Any:
    """A model with the weights of a dense checkpoint; arguments as of `fresh_model`.

    Raises:
        CheckpointError: as `ModelShape.of_checkpoint`, or it has not all weights of a language model.
    """
    from transformers import set_seed

    set_seed(seed)
    architecture = get_architecture(ModelShape.of_checkpoint(directory).architecture)
    dropouts = dict.fromkeys(architecture.dropouts, dropout)
    model, found = trained_model(directory, dtype=torch.float32, output_loading_info=True, **dropouts)
    if found["missing_keys"]:
        raise CheckpointError(
            f"{directory} holds no {architecture.model}: {', '.join(sorted(found['missing_keys']))} are missing, and "
            "training would start from random ones. Name a checkpoint that was saved with its language model's head."
        )
    if ffn is not None:
        convert(model, ffn, filter=after_first(model, dense_layers))
    return model.train()


def step_bound(shape: ModelShape, ffn: FFNConfig, dense_layers: int = 0) -> StepBound:
    """The FLOPs of a training step on one sequence: dense, with `ffn` after the first layers, and without FFNs."""
    with torch.device("meta"):
        dense, other = fresh_model(shape), fresh_model(shape, ffn, dense_layers=dense_layers)
    flops = step_flops(dense, shape.sequence, causal=not get_architecture(shape.architecture).masked)
    without_ffn = flops - shape.sequence * shape.ffn_flops_per_token
    # Counted by themselves: in a whole model their batched products could not be told from those of attention.
    ffns = sum(layer_flops(module, shape.sequence, shape.d_model) for _, module in fastffn_modules(other))
    ffns += shape.sequence * shape.ffn_flops_per_token * dense_layers // shape.layers
    return StepBound(flops, without_ffn + ffns, without_ffn)
