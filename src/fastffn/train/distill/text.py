"""What a distillation reads: the student's tokenizer, and sequences to train and to measure on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastffn.convert.loading import longest_sequence
from fastffn.data import blocks
from fastffn.data.masking import Masking
from fastffn.data.sequences import pad, token_sequences
from fastffn.data.tokenizer import fits_vocabulary, load_tokenizer
from fastffn.errors import ConfigError, DataError
from fastffn.train.distill.config import DistillConfig
from fastffn.train.distill.models import Pair
from fastffn.train.processes import say
from fastffn.train.text import HELD_OUT, spread


@dataclass(frozen=True)
class DistillText:
    """The text of a distillation.

    Attributes:
        tokenizer: the student's.
        train, validation: rows with `input_ids`.
        collate: makes a batch of rows.
        masking: for masked language models.
        train_tokens, validation_tokens: in all rows.
        identity: differs whenever the rows do.
    """

    tokenizer: Any
    train: Any
    validation: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    masking: Masking | None
    train_tokens: int
    validation_tokens: int
    identity: str

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"train_tokens": self.train_tokens, "validation_tokens": self.validation_tokens}


def read_distill_text(config: DistillConfig, pair: Pair) -> DistillText:
    """Reads the text: packed blocks for causal language models, sequences with special tokens for encoders.

    Raises:
        DataError: no text, too little, or a tokenizer that does not fit.
        ConfigError: sequences are longer than the model takes.
    """
    limit = longest_sequence(pair.config)
    if limit is not None and config.sequence > limit:
        raise ConfigError(
            f"sequence is {config.sequence}; the model takes {limit} tokens at most. Give --sequence {limit}."
        )
    tokenizer = _tokenizer(pair)
    options: dict[str, Any] = {
        "validation": config.validation,
        "validation_fraction": config.validation_fraction,
        "column": config.text_column,
        "separator": config.document_separator,
    }
    found: Any
    masking: Masking | None = None
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    if pair.task == "causal":
        found = blocks.token_blocks(config.data, tokenizer, config.sequence, **options)
        collate = _block_batch
    else:
        found = token_sequences(config.data, tokenizer, config.sequence, **options)
        collate = partial(pad, padding=tokenizer.pad_token_id)
        if pair.task == "masked":
            masking = Masking.of(tokenizer)
    if len(found.train) < config.batch:
        raise DataError(
            f"The text makes {len(found.train)} sequences of {'' if pair.task == 'causal' else 'at most '}"
            f"{config.sequence} tokens, fewer than one batch of {config.batch}. Give more text, or a smaller --batch."
        )
    # Every step is of the same size: the rest that fills no batch is left out.
    train = found.train.select(range(len(found.train) // config.batch * config.batch))
    validation = spread(found.validation, config.validation_blocks)
    tokens, unseen = (
        len(rows) * config.sequence if pair.task == "causal" else rows.tokens for rows in (train, validation)
    )
    say(
        f"Text: {config.data}; {tokens:,} tokens to train on, {unseen:,} to measure on ({HELD_OUT[found.held_out]}); "
        f"vocabulary {len(tokenizer):,}."
    )
    return DistillText(tokenizer, train, validation, collate, masking, tokens, unseen, found.identity)


def _block_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks as a batch: `input_ids [batch, block]`, int64."""
    return {"input_ids": torch.from_numpy(np.stack([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]))}


def _tokenizer(pair: Pair) -> Any:
    """The student's, or the teacher's where the student has none: their vocabulary is the same."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    having = [path for path in (pair.student, pair.teacher) if any((path / name).is_file() for name in names)]
    if not having:
        raise DataError(
            f"Neither {pair.student} nor {pair.teacher} holds a tokenizer (tokenizer.json); save the model's beside "
            "it: tokenizer.save_pretrained(directory)."
        )
    directory: Path = having[0]
    tokenizer = load_tokenizer(str(directory), end_of_text=pair.task == "causal")
    if not fits_vocabulary(len(tokenizer), pair.config.vocab_size):
        raise DataError(
            f"The tokenizer in {directory} has {len(tokenizer)} tokens, the model {pair.config.vocab_size}: they do "
            "not belong together."
        )
    needed = {"causal": (), "masked": ("pad_token", "mask_token"), "states": ("pad_token",)}[pair.task]
    for name in needed:
        if getattr(tokenizer, f"{name}_id") is None:
            raise DataError(f"The tokenizer in {directory} has no {name}, which sequences of this model need.")
    return tokenizer
