"""The beginning of a text as batches for a model of any kind, special tokens and padding as the model knows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fastffn.data.text import TextSource
from fastffn.data.tokenise import plain_backend
from fastffn.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Enough to keep the processor busy; more would only cost memory.
BATCH = 2048


def text_batches(
    source: TextSource, tokenizer: PreTrainedTokenizerFast, *, sequence: int, tokens: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of about 2,048 tokens.

    Args:
        source: the text; its first `tokens` tokens are taken, all if there are fewer.
        tokenizer: puts its special tokens around each sequence, if it does so by itself.
        sequence: tokens in a sequence at most; no sequence reaches over the end of a document.
        tokens: how many in all.

    Yields:
        `input_ids`, `attention_mask`: `[B, T]`; padding is 0 in the mask.

    Raises:
        DataError: something cannot be read.
    """
    rows: list[list[int]] = []
    held, left = 0, tokens
    for row in _sequences(source, tokenizer, sequence):
        rows.append(row[:left])
        held += len(rows[-1])
        left -= len(rows[-1])
        if held >= BATCH or left <= 0:
            yield _padded(rows)
            rows, held = [], 0
        if left <= 0:
            return
    if rows:
        yield _padded(rows)


def _sequences(source: TextSource, tokenizer: PreTrainedTokenizerFast, sequence: int) -> Iterator[list[int]]:
    backend = plain_backend(tokenizer)
    special = backend.num_special_tokens_to_add(False)
    if sequence <= special:
        raise DataError(f"Sequences of {sequence} tokens leave no room beside {special} special tokens.")
    backend.enable_truncation(sequence)
    for piece in source.pieces():
        encoding = backend.encode(piece.text)
        for part in (encoding, *encoding.overflowing):
            if len(part.ids) > special:
                yield part.ids


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
