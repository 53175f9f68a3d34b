"""Sequences of tokens for encoders: as long as they come, up to a limit, with the tokenizer's special tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastffn.data.text import DOCUMENT_SEPARATOR, TextSource, find_text, held_out_text
from fastffn.data.tokenise import batches_of, held_out_by, parts_of, plain_backend
from fastffn.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Sequences(torch.utils.data.Dataset[dict[str, Any]]):
    """Sequences of different lengths, in memory: 4 bytes a token.

    Args:
        rows: token numbers of each.
    """

    def __init__(self, rows: Iterable[np.ndarray]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index]}

    def select(self, indices: Iterable[int]) -> Sequences:
        """Some of them."""
        return Sequences(self.rows[index] for index in indices)

    @property
    def tokens(self) -> int:
        """In all sequences, special ones included."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class TokenSequences:
    """Training and validation sequences; `identity` differs whenever they differ."""

    train: Sequences
    validation: Sequences
    held_out: str
    identity: str


def token_sequences(
    data: str,
    tokenizer: PreTrainedTokenizerFast,
    longest: int,
    *,
    validation: str | None = None,
    validation_fraction: float = 0.05,
    column: str = "text",
    separator: str | None = DOCUMENT_SEPARATOR,
) -> TokenSequences:
    """Tokenises `data` into sequences of at most `longest` tokens; none goes over the end of a document.

    Args:
        data, validation, validation_fraction, column, separator: see `fastffn.data.blocks.token_blocks`.
        tokenizer: a fast tokenizer; its special tokens are in every sequence.
        longest: tokens in a sequence, special ones included.

    Raises:
        DataError: there is no text, it is too little, or `longest` leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add()
    if longest <= special:
        raise DataError(f"A sequence of {longest} tokens has no room for text beside {special} special tokens.")
    source = find_text(data, column=column, separator=separator)
    other = held_out_text(source, validation, column=column, separator=separator)
    every = max(2, round(1 / validation_fraction)) if other is None else None
    backend = plain_backend(tokenizer)
    backend.enable_truncation(longest)
    held_out = held_out_by(source, every)
    found: list[list[np.ndarray]] = [[], []]
    for part, row in _rows(backend, source, every, held_out):
        found[part].append(row)
    if other is not None:
        found[1] = [row for _, row in _rows(backend, other, None, None)]
    for name, rows in (("train", found[0]), ("validation", found[1])):
        if not rows:
            after = "" if other else f" after 1 in {every} of its parts is held out"
            raise DataError(
                f"The {name} text ({data if name == 'train' else validation or data}) is empty{after}. Give more text"
                f"{'' if other else ', or text to validate on with --validation'}."
            )
    stamp = f"{source.identity} {other.identity if other else every} {longest} {backend.to_str()}"
    return TokenSequences(
        train=Sequences(found[0]),
        validation=Sequences(found[1]),
        held_out=held_out or "validation text",
        identity=hashlib.sha256(stamp.encode()).hexdigest(),
    )


def _rows(
    backend: Any, source: TextSource, every: int | None, held_out: str | None
) -> Iterator[tuple[int, np.ndarray]]:
    for batch in batches_of(parts_of(source.pieces(), every, held_out)):
        for part, encoding in zip(batch, backend.encode_batch([part.piece.text for part in batch]), strict=True):
            for piece in (encoding, *encoding.overflowing):
                yield part.part, np.array(piece.ids, np.int32)


def pad(rows: list[dict[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """Sequences as a batch as long as the longest: `input_ids` and `attention_mask`, `[batch, longest]`, int64."""
    tensors = [torch.from_numpy(np.asarray(row["input_ids"], dtype=np.int64)) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in tensors])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
