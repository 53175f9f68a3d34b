"""Documents come in pieces of bounded length, so that a text of any size passes through a little memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# White space of one blank line at most, where blank lines separate documents.
_BLANK_LINE = 1024


class Piece(NamedTuple):
    """A stretch of text, and whether its document ends with it."""

    text: str
    ends_document: bool


def pieces_of(text: str, size: int) -> Iterator[Piece]:
    """A document in pieces of at most `size` characters; none if it is only white space."""
    if text and not text.isspace():
        yield from _divided(text, size)


def _divided(text: str, size: int) -> Iterator[Piece]:
    """The text, whatever it is, in pieces; an empty one is one piece."""
    start = 0
    while len(text) - start > size:
        end = _cut(text, start, start + size)
        yield Piece(text[start:end], False)
        start = end
    yield Piece(text[start:], True)


def split_documents(texts: Iterator[str], separator: str | None, size: int) -> Iterator[Piece]:
    r"""The documents of a text that itself comes in stretches of any length.

    Args:
        texts: the stretches.
        separator: the line that ends a document; `blank`: blank lines do; None or empty: all of it is one document.
        size: characters in a piece, at most.

    The line breaks before and after a separator (`\n` or `\r\n`) belong to it, not to the documents; all else is
    kept as it is. Documents of white space only are left out, and so is white space at the beginning of a document
    where it fills a piece.
    """
    if not separator:
        pattern, longest = None, 0
    elif separator == "blank":
        pattern, longest = re.compile(r"\n[ \t]*\r?(?=\n)"), _BLANK_LINE
    else:
        pattern, longest = re.compile(rf"\n{re.escape(separator)}\r?(?=\n)"), len(separator) + 2
    # A line break is put before the text and one behind it, so that every separator stands between two. The last one
    # is not taken by a match: the next separator may begin with it.
    buffer, searched, start = "\n", 0, 1
    begun = False
    while True:
        text = next(texts, None)
        buffer = buffer[searched:] + ("\n" if text is None else text)
        start, searched = start - searched, 0
        while pattern is not None and (found := pattern.search(buffer, searched)):
            rest = buffer[start : found.start()].removesuffix("\r")
            # A document that has begun ends even if nothing is left of it.
            yield from _divided(rest, size) if begun else pieces_of(rest, size)
            begun = False
            searched = found.end()
            start = searched + 1
        if text is None:
            yield from _divided(buffer[start:-1], size) if begun else pieces_of(buffer[start:-1], size)
            return
        # The last line may be the beginning of a separator, as long as it is short enough.
        end_of_lines = buffer.rfind("\n")
        safe = len(buffer) if len(buffer) - end_of_lines > longest + 1 else end_of_lines
        while safe - start > size:
            end = _cut(buffer, start, start + size)
            piece = buffer[start:end]
            start = searched = end
            if begun or not piece.isspace():
                yield Piece(piece, False)
                begun = True


def _cut(text: str, start: int, end: int) -> int:
    """Where to end a piece that begins at `start` and must not go beyond `end`.

    At a line end in its second half, else at a space there, else (one endless word) at `end`. Before the white space,
    since byte-level tokenizers take white space together with the word that follows: the tokens are those of the
    uncut text.
    """
    middle = (start + end) // 2
    at = text.rfind("\n", middle, end)
    if at < 0:
        at = text.rfind(" ", middle, end)
    if at < 0:
        return end
    while at > middle and text[at - 1].isspace():
        at -= 1
    return at
