"""Blocks of tokens to train and validate on, and batches of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastffn.data.text import DOCUMENT_SEPARATOR, TextSource, find_text, held_out_text
from fastffn.data.tokenise import Record, plain_backend
from fastffn.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenBlocks:
    """Training and validation blocks.

    `identity` differs whenever they differ.

    Attributes:
        train, validation: data sets with a column `input_ids` of `block` tokens; a row of it is an int64 numpy array.
        train_characters, validation_characters: of the text that they came from.
        train_documents, validation_documents: in that text; a document in stretches counts where it ends.
        held_out: where validation came from: `documents` (every n-th), `stretches` (every n-th, of a text of few
            documents: their neighbours are trained on), or `validation text` (one of its own).
        seconds: that tokenising took this time; 0.0 where all came from the cache.
        tokens_per_second: of the tokens that were made this time; None where all came from the cache.
    """

    train: Any
    validation: Any
    train_characters: int
    validation_characters: int
    train_documents: int
    validation_documents: int
    held_out: str
    seconds: float
    tokens_per_second: float | None

    @property
    def identity(self) -> str:
        """See the class."""
        return f"{self.train._fingerprint} {self.validation._fingerprint}"


def token_blocks(
    data: str,
    tokenizer: PreTrainedTokenizerFast,
    block: int,
    *,
    validation: str | None = None,
    validation_fraction: float = 0.05,
    column: str = "text",
    separator: str | None = DOCUMENT_SEPARATOR,
) -> TokenBlocks:
    """Tokenises `data` into blocks, documents joined by the end-of-text token; once, then they come from the cache.

    Args:
        data: see `find_text`.
        tokenizer: a fast tokenizer.
        block: tokens in a block.
        validation: text to validate on; None: a data set's `validation` split, or else every n-th document of `data`.
        validation_fraction: the part that is held out in the latter case.
        column, separator: see `find_text`.

    Raises:
        DataError: there is no text, it cannot be read, or it is too little for one block of each.
    """
    source = find_text(data, column=column, separator=separator)
    held_out = held_out_text(source, validation, column=column, separator=separator)
    every = max(2, round(1 / validation_fraction)) if held_out is None else None
    train, unseen, record, seconds = _rows(source, tokenizer, block, every)
    tokens = sum(record.blocks) * block if seconds else 0
    if held_out is not None:
        unseen, _, other, more_seconds = _rows(held_out, tokenizer, block, None)
        tokens += other.blocks[0] * block if more_seconds else 0
        seconds += more_seconds
        record.documents[1], record.characters[1] = other.documents[0], other.characters[0]
    for name, text, rows in (("train", source, train), ("validation", held_out or source, unseen)):
        if len(rows) == 0:
            raise DataError(
                f"The {name} text ({text.data}) is shorter than one block: it has fewer than {block} tokens"
                f"{f' after 1 in {every} of its {record.held_out} is held out' if every else ''}. Give more text"
                f"{', or text to validate on with --validation' if every else ''}, or a shorter --sequence."
            )
    return TokenBlocks(
        train=train,
        validation=unseen,
        train_characters=record.characters[0],
        validation_characters=record.characters[1],
        train_documents=record.documents[0],
        validation_documents=record.documents[1],
        held_out=record.held_out or "validation text",
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else None,
    )


def _rows(
    source: TextSource, tokenizer: PreTrainedTokenizerFast, block: int, every: int | None
) -> tuple[Any, Any, Record, float]:
    """Rows to train on and held out, what is known of them, and the seconds that writing them took."""
    from fastffn.data.cache import cached_rows

    rows, seconds = cached_rows(source, plain_backend(tokenizer).to_str(), tokenizer.eos_token_id, block, every)
    record = Record(**json.loads(rows[len(rows) - 1]["note"]))
    blocks = rows.remove_columns("note").with_format("numpy")
    first, second = record.blocks
    return blocks.select(range(first)), blocks.select(range(first, first + second)), record, seconds


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks as a batch: `input_ids` and `labels`, both `[batch, block]`, int64.

    The first token is predicted by none. Its label is -100, since the Trainer divides the loss by the number of labels.
    """
    ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]))
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}
