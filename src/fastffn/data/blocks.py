"""Tokens in blocks of a fixed length, written once into the memory-mapped cache of `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastffn.data.text import Piece, TextSource, find_text, splits_of
from fastffn.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Changes when the same text and tokenizer would give other blocks: part of the cache's fingerprint.
LAYOUT_VERSION = 1
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class TokenBlocks:
    """Training and validation blocks.

    `identity` differs whenever they differ.

    Attributes:
        train, validation: data sets with a column `input_ids` of `block` tokens.
        train_characters, validation_characters: of the text that they came from.
    """

    train: Any
    validation: Any
    train_characters: int
    validation_characters: int

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
) -> TokenBlocks:
    """Tokenises `data` into blocks, documents joined by the end-of-text token.

    Args:
        data: see `find_text`.
        tokenizer: a fast tokenizer.
        block: tokens in a block.
        validation: text to validate on; None: a data set's `validation` split, or else every n-th piece of `data`.
        validation_fraction: the part that is held out in the latter case.
        column: the column of a data set that holds the text.

    Raises:
        DataError: there is no text, or too little for one block of each.
    """
    source = find_text(data, column=column)
    if validation is not None:
        held_out = find_text(validation, column=column)
        if "validation" in splits_of(held_out):
            held_out = find_text(validation, split="validation", column=column)
        every = None
    elif {"train", "validation"} <= set(splits_of(source)):
        held_out, every = find_text(data, split="validation", column=column), None
    else:
        held_out, every = source, max(2, round(1 / validation_fraction))
    parts = {}
    for name, text, held in (("train", source, False), ("validation", held_out, every is not None)):
        parts[name] = _cached_blocks(text, tokenizer, block, every, held)
        if len(parts[name]) == 0:
            raise DataError(
                f"The {name} text ({text.data}) is shorter than one block: it has fewer than {block} tokens"
                f"{f' after 1 piece in {every} is held out' if every else ''}. Give more text"
                f"{', or text to validate on with --validation' if every else ''}, or a shorter --sequence."
            )
    characters = {name: sum(rows["characters"]) for name, rows in parts.items()}
    return TokenBlocks(
        parts["train"].remove_columns("characters"),
        parts["validation"].remove_columns("characters"),
        characters["train"],
        characters["validation"],
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks as a batch: `input_ids` and `labels`, both `[batch, block]`, int64.

    The first token is predicted by none. Its label is -100, since the Trainer divides the loss by the number of labels.
    """
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.long)
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token numbers of each text, without special tokens; all cores are used."""
    encodings = _backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A copy of the tokenizer's core that neither cuts nor pads, as a saved tokenizer may."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _cached_blocks(
    source: TextSource, tokenizer: PreTrainedTokenizerFast, block: int, every: int | None, held_out: bool
) -> Any:
    import datasets

    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int32"), length=block),
            "characters": datasets.Value("int64"),
        }
    )
    what: dict[str, Any] = {
        "source": asdict(source),
        "tokenizer_json": _backend(tokenizer).to_str(),
        "end_of_text": tokenizer.eos_token_id,
        "block": block,
        "every": every,
        "held_out": held_out,
        "layout": LAYOUT_VERSION,
    }
    try:
        return datasets.Dataset.from_generator(_generate, features=features, gen_kwargs=what)
    except ValueError:
        # datasets has no data sets of no rows.
        if next(_generate(**what), None) is None:
            return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        # datasets wraps what the generator raised; the user wants the cause.
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _generate(
    source: dict[str, Any],
    tokenizer_json: str,
    end_of_text: int,
    block: int,
    every: int | None,
    held_out: bool,
    layout: int,
) -> Iterator[dict[str, Any]]:
    """The blocks of one part; what is left at the end and fills no block is dropped.

    Plain values in, so that `datasets` can fingerprint them.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    pieces: Iterator[Piece] = TextSource(**source | {"files": tuple(source["files"])}).pieces()
    if every is not None:
        # The first of every n, so that any text of two pieces has both parts.
        pieces = (piece for n, piece in enumerate(pieces) if (n % every == 0) is held_out)
    buffer: list[int] = []
    characters = 0
    for batch in _batches(pieces):
        encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            buffer.extend(encoding.ids)
            if piece.ends_document:
                buffer.append(end_of_text)
            characters += len(piece.text)
            for start in range(0, len(buffer) - block + 1, block):
                yield {"input_ids": buffer[start : start + block], "characters": characters}
                characters = 0
            buffer = buffer[len(buffer) // block * block :]


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """About a megabyte of text at a time: enough to keep all cores of the tokenizer busy."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
