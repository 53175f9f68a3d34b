"""Documents -> token blocks. Reading, encoding, and cutting into blocks run beside each other.

Encoding takes nearly all of the time and uses all cores; the Python around it runs while other text is encoded. What
is left serial is what the slower of reader and cutter needs: docs/log.md has the figures.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from fastffn.data.pieces import Piece
from fastffn.data.progress import Progress
from fastffn.data.text import TextSource

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

# Half a million tokens: enough pieces for every core, few enough that three batches take little memory.
_BATCH_CHARACTERS = 2_000_000
# Rows of the validation blocks written at once.
_ROWS = 256


@dataclass
class Record:
    """What is known of the blocks of one text when they are written. Pairs are (training, held out).

    Attributes:
        blocks: full ones.
        documents: those that end in the part.
        characters: of the text.
        held_out: `documents`, `stretches`, or None where nothing is held out.
    """

    blocks: list[int] = field(default_factory=lambda: [0, 0])
    documents: list[int] = field(default_factory=lambda: [0, 0])
    characters: list[int] = field(default_factory=lambda: [0, 0])
    held_out: str | None = None


class Part(NamedTuple):
    """A piece, which part it belongs to (0: training, 1: held out), and whether an end-of-text token follows it."""

    piece: Piece
    part: int
    closes: bool


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A copy of the tokenizer's core that neither cuts nor pads, as a saved tokenizer may."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def encoded_pieces(tokenizer: PreTrainedTokenizerFast, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, list[int]]]:
    """Each piece and its token numbers, without special tokens; all cores are used."""
    backend = plain_backend(tokenizer)
    for batch in batches_of(parts_of(pieces, None, None)):
        texts = [part.piece.text for part in batch]
        for part, encoding in zip(batch, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            yield part.piece, encoding.ids


def block_tables(
    source: TextSource, tokenizer_json: str, end_of_text: int, block: int, every: int | None
) -> Iterator[pyarrow.Table]:
    """Tables of blocks: those to train on, then those held out, then one row whose `note` is the `Record` as JSON.

    Args:
        source: the text.
        tokenizer_json: the tokenizer's core.
        end_of_text: the token behind every document, and behind every stretch that is not continued.
        block: tokens in a block; what is left at the end of a part and fills none is dropped.
        every: the first of every so many documents is held out, or, of a text of fewer than twice as many, stretches;
            None: nothing.

    Yields:
        `input_ids`: fixed-size lists of `block` int32; `note`: text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    record = Record(held_out=held_out_by(source, every))
    read = [0]

    def report(position: int) -> None:
        read[0] = position

    def encode(batch: list[Part]) -> tuple[list[Part], list[Any]]:
        return batch, tokenizer.encode_batch_fast([part.piece.text for part in batch], add_special_tokens=False)

    parts = parts_of(source.pieces(report), every, record.held_out)
    encoded = _ahead(encode(batch) for batch in _ahead(batches_of(parts)))
    waiting = [np.empty(0, np.int32), np.empty(0, np.int32)]
    progress = Progress(source.data, source.size)
    tokens = 0
    # The held-out blocks come last, so that both parts are contiguous: on disk until then, they may be many.
    with tempfile.TemporaryFile(prefix="fastffn-") as held_out:
        try:
            for batch, encodings in encoded:
                found: list[list[int]] = [[], []]
                for (piece, part, closes), encoding in zip(batch, encodings, strict=True):
                    found[part] += encoding.ids
                    if closes:
                        found[part].append(end_of_text)
                    record.documents[part] += piece.ends_document
                    record.characters[part] += len(piece.text)
                for part in (0, 1):
                    # In one go from Python's numbers: half of the time of this loop.
                    stream = np.concatenate([waiting[part], np.array(found[part], np.int32)])
                    whole = len(stream) // block * block
                    waiting[part] = stream[whole:]
                    record.blocks[part] += whole // block
                    tokens += len(found[part])
                    if part == 1:
                        held_out.write(stream[:whole].tobytes())
                    elif whole:
                        yield _table(stream[:whole], block)
                progress.update(read[0], sum(record.documents), tokens)
        finally:
            progress.close()
        held_out.seek(0)
        while rows := held_out.read(4 * block * _ROWS):
            yield _table(np.frombuffer(rows, np.int32), block)
    yield _table(np.zeros(block, np.int32), block, note=json.dumps(vars(record)))


def _table(tokens: np.ndarray, block: int, note: str = "") -> pyarrow.Table:
    import pyarrow

    ids = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tokens), block)
    return pyarrow.table({"input_ids": ids, "note": [note] * len(ids)})


def held_out_by(source: TextSource, every: int | None) -> str | None:
    """What is held out of a text: whole `documents`, `stretches` where there are few, None if nothing is."""
    if every is None:
        return None
    documents = sum(piece.ends_document for piece in _until_document(source.pieces(), 2 * every))
    return "documents" if documents == 2 * every else "stretches"


def _until_document(pieces: Iterator[Piece], number: int) -> Iterator[Piece]:
    """The pieces up to the end of the document of that number."""
    ends = (piece for piece in pieces if piece.ends_document)
    return islice(ends, number)


def parts_of(pieces: Iterator[Piece], every: int | None, held_out: str | None) -> Iterator[Part]:
    """Which piece goes where. The first of every n is held out, so that any text of two has both parts."""
    number = 0
    waiting: tuple[Piece, int] | None = None
    for piece in pieces:
        part = int(every is not None and number % every == 0)
        if waiting is not None:
            # Where the next piece goes elsewhere, something else will follow this one.
            yield Part(*waiting, closes=waiting[0].ends_document or part != waiting[1])
        waiting = piece, part
        number += piece.ends_document or held_out == "stretches"
    if waiting is not None:
        yield Part(*waiting, closes=True)


def batches_of(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Parts by the dozen or hundred: as many as are tokenised at once."""
    batch: list[Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread gets each while the one before it is used."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
