"""What `data` names: files, folders and globs, data sets of the `datasets` package, Python's own documentation."""

from __future__ import annotations

import glob
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastffn.data.digest import file_digest
from fastffn.data.files import FORMATS, Report, describe_formats, file_pieces, is_readable, suffixes
from fastffn.data.pieces import Piece, pieces_of
from fastffn.data.python_docs import python_docs
from fastffn.data.rows import is_saved, rows_identity, rows_pieces, splits
from fastffn.errors import ConfigError, DataError, did_you_mean

PYTHON_DOCS = "python-docs"
DOCUMENT_SEPARATOR = "<|endoftext|>"
# Short enough for several on every core in a batch that is tokenised at once.
_PIECE = 16_384


@dataclass(frozen=True)
class TextSource:
    """Text that can be read again and again, and an identity that changes when the text does.

    Attributes:
        data: what the user named.
        kind: `python-docs`, `files`, `saved` (a data set written by `save_to_disk`) or `named` (streamed by name).
        files: the files, where kind is `files`.
        size: their bytes on disk, where kind is `files`.
        split: the split of a data set.
        column: the column or key that holds the text, where there are such.
        separator: the line that ends a document in text files; see `split_documents`.
        identity: text that differs whenever what is read may differ; for files, what they hold and not where they are.
    """

    data: str
    kind: str
    files: tuple[str, ...] = ()
    size: int | None = None
    split: str | None = None
    column: str = "text"
    separator: str | None = DOCUMENT_SEPARATOR
    identity: str = ""

    def pieces(self, report: Report = lambda position: None) -> Iterator[Piece]:
        """The documents in order, each in pieces of at most 16,384 characters; none of white space only.

        Args:
            report: is told how many of the `size` bytes have been read, where kind is `files`.

        Raises:
            DataError: something cannot be read; the message says what, where, and what to do.
        """
        if self.kind == "python-docs":
            for text in python_docs():
                yield from pieces_of(text, _PIECE)
        elif self.kind == "files":
            # Some two hundred pieces at least, so that a part held out in stretches is spread over the whole.
            longest = max(256, min(_PIECE, (self.size or 0) // 200))
            before = 0
            for name in self.files:
                file = Path(name)

                def report_file(position: int, before: int = before) -> None:
                    report(before + position)

                yield from file_pieces(file, self.column, self.separator, longest, report_file)
                before += file.stat().st_size
        else:
            yield from rows_pieces(self.data, self.split, self.column, _PIECE, saved=self.kind == "saved")


def find_text(
    data: str, *, split: str | None = None, column: str = "text", separator: str | None = DOCUMENT_SEPARATOR
) -> TextSource:
    """Finds out what `data` names.

    Args:
        data: `python-docs`; a file; a folder of files; a glob (`**` goes into folders); a directory written by
            `save_to_disk`; `openwebtext`, `wikitext-2`, `wikitext-103`; or another data set's name on the hub, with
            its configuration after a colon (`owner/name:configuration`).
        split: the split of a data set; None: `train`, or the only one there is.
        column: the column of a data set or Parquet file, or key of JSON lines, that holds the text.
        separator: the line that ends a document in text files; `blank`: blank lines do; None or empty: each file is
            one document.

    Raises:
        DataError: nothing is there, it cannot be read, or it is empty.
        ConfigError: the separator is not one line.
    """
    if separator and ("\n" in separator or "\r" in separator or not separator.strip()):
        raise ConfigError(
            f"document_separator is {separator!r}; it must be what one line holds, 'blank' for blank lines, or empty "
            "where each file is one document."
        )
    if data == PYTHON_DOCS:
        identity = f"python {platform.python_version()} {platform.python_implementation()}"
        return TextSource(data, "python-docs", identity=identity)
    path = Path(data).expanduser()
    if path.is_dir():
        if is_saved(path):
            identity = rows_identity(str(path), split, saved=True)
            return TextSource(str(path), "saved", split=split, column=column, identity=identity)
        return _from_files(data, _readable(data, path.rglob("*")), column, separator)
    if path.exists():
        return _from_files(data, [path], column, separator)
    if any(sign in data for sign in "*?["):
        found = glob.glob(str(path), recursive=True)
        return _from_files(data, _readable(data, map(Path, found)), column, separator)
    if _looks_like_a_path(data, path):
        known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"{data} does not exist; name a file ({describe_formats()}), a folder of them, a glob, or a data set."
            f"{did_you_mean(path.name, known)}"
        )
    identity = rows_identity(data, split, saved=False)
    return TextSource(data, "named", split=split, column=column, identity=identity)


def splits_of(source: TextSource) -> list[str]:
    """Names of a data set's splits; an empty list for anything that has none."""
    return splits(source.data, saved=source.kind == "saved") if source.kind in ("saved", "named") else []


def held_out_text(
    source: TextSource, validation: str | None, *, column: str = "text", separator: str | None = DOCUMENT_SEPARATOR
) -> TextSource | None:
    """The text to validate on: `validation`, or the `validation` split of a data set; None: hold some out of `source`.

    Raises:
        DataError: see `find_text`.
    """
    if validation is not None:
        found = find_text(validation, column=column, separator=separator)
        if "validation" in splits_of(found):
            found = find_text(validation, split="validation", column=column)
        return found
    if {"train", "validation"} <= set(splits_of(source)):
        return find_text(source.data, split="validation", column=column)
    return None


def _looks_like_a_path(data: str, path: Path) -> bool:
    """Whether a name that is nowhere on disk is a mistyped path, and not one to ask the hub for."""
    if path.is_absolute() or data.startswith((".", "~")) or data.endswith("/"):
        return True
    kind, compression = suffixes(path)
    if kind in FORMATS or compression or "\\" in data:
        return True
    # A name on the hub has one slash, and its owner is hardly a folder here.
    return data.count("/") > 1 or ("/" in data and path.parent.is_dir())


def _readable(data: str, found: Iterator[Path]) -> list[Path]:
    """The files that can be read, in order of their paths."""
    files = sorted(path for path in found if path.is_file())
    readable = [path for path in files if is_readable(path)]
    if not readable:
        others = sorted({"".join(suffixes(path)) or path.name for path in files})
        raise DataError(
            f"{data} holds no text files: looked for {describe_formats()}"
            + (f"; there are only {', '.join(others[:10])}." if others else "; there are no files at all.")
        )
    return readable


def _from_files(data: str, files: list[Path], column: str, separator: str | None) -> TextSource:
    stamps, total = [], 0
    for file in files:
        try:
            stamps.append(f"{''.join(suffixes(file))} {file_digest(file)}")
            total += file.stat().st_size
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    if not total:
        raise DataError(f"{data} is empty: {len(files)} file(s), not one byte of text.")
    return TextSource(
        data,
        "files",
        files=tuple(str(file) for file in files),
        size=total,
        column=column,
        separator=separator,
        identity="\n".join(stamps),
    )
