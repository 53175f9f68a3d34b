"""Where text comes from: local UTF-8 files and folders, data sets of the `datasets` package, Python's own docs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastffn.data.python_docs import python_docs
from fastffn.errors import DataError

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")


class Piece(NamedTuple):
    """A stretch of text, and whether its document ends with it."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class TextSource:
    """Text that can be read again and again, and an identity that changes when the text does.

    Attributes:
        data: what the user named.
        kind: `python-docs`, `files`, `saved` (a data set written by `save_to_disk`) or `named` (for `load_dataset`).
        files: the files, where kind is `files`.
        split: the split of a data set.
        column: the column of a data set that holds the text.
        identity: text that differs whenever what is read may differ.
    """

    data: str
    kind: str
    files: tuple[str, ...] = ()
    split: str | None = None
    column: str = "text"
    identity: str = ""

    def pieces(self) -> Iterator[Piece]:
        """The text in order. A large file comes in pieces cut at line ends; everything else document by document.

        Raises:
            DataError: a file is not UTF-8 or cannot be read, or a data set has no such column.
        """
        if self.kind == "python-docs":
            yield from (Piece(text, True) for text in python_docs())
        elif self.kind == "files":
            total = sum(Path(file).stat().st_size for file in self.files)
            # Some two hundred pieces at least, so that a part held out is spread over the whole.
            size = max(256, min(65_536, total // 200))
            for file in self.files:
                yield from _file_pieces(Path(file), size)
        else:
            for row in _load(self):
                text = row.get(self.column)
                if not isinstance(text, str):
                    raise DataError(
                        f"The data set '{self.data}' has no text in a column '{self.column}'; it has "
                        f"{', '.join(row)}. Name the column with --text-column."
                    )
                yield Piece(text, True)


def find_text(data: str, *, split: str | None = None, column: str = "text") -> TextSource:
    """Finds out what `data` names.

    Args:
        data: `python-docs`; a UTF-8 text file; a folder of them; a data set directory; or a data set's name, with
            its configuration after a colon (`wikitext:wikitext-2-raw-v1`).
        split: the split of a data set; None: `train`, or the only one there is.
        column: the column of a data set that holds the text.

    Raises:
        DataError: nothing is there, it cannot be read, or it is empty.
    """
    if data == PYTHON_DOCS:
        identity = f"python {platform.python_version()} {platform.python_implementation()}"
        return TextSource(data, "python-docs", identity=identity)
    path = Path(data).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _with_identity(TextSource(str(path), "saved", split=split, column=column))
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in TEXT_SUFFIXES)
        if not files:
            raise DataError(
                f"The folder {path} holds no text files: looked for {', '.join(TEXT_SUFFIXES)} in it and below it."
            )
        return _from_files(data, files)
    if path.exists():
        return _from_files(data, [path])
    if path.is_absolute() or data.startswith((".", "~")) or data.endswith("/") or path.suffix.lower() in TEXT_SUFFIXES:
        raise DataError(f"{data} does not exist; name a UTF-8 text file, a folder of them, or a data set.")
    return _with_identity(TextSource(data, "named", split=split, column=column))


def _from_files(data: str, files: list[Path]) -> TextSource:
    stamps = []
    for file in files:
        try:
            with file.open("rb"):
                status = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}).") from error
        stamps.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
    if not any(file.stat().st_size for file in files):
        raise DataError(f"{data} is empty: {len(files)} file(s), not one byte of text.")
    return TextSource(data, "files", tuple(str(file) for file in files), identity="\n".join(stamps))


def _file_pieces(path: Path, size: int) -> Iterator[Piece]:
    position = 0
    waiting: str | None = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while True:
                text = file.read(size)
                if text and not text.endswith("\n"):
                    # On to the end of the line, but not for ever: a file may be one line.
                    text += file.readline(size)
                if not text:
                    break
                position += len(text.encode("utf-8"))
                if waiting is not None:
                    yield Piece(waiting, False)
                waiting = text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at about byte {position + error.start} "
            "starts no character. Convert it (for instance with iconv), or leave it out."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    if waiting is not None:
        yield Piece(waiting, True)


def _with_identity(source: TextSource) -> TextSource:
    rows = _load(source)
    return TextSource(source.data, source.kind, split=source.split, column=source.column, identity=rows._fingerprint)


def _load(source: TextSource) -> Any:
    """The rows of a data set."""
    import datasets

    try:
        if source.kind == "saved":
            loaded = datasets.load_from_disk(source.data)
        else:
            name, _, configuration = source.data.partition(":")
            loaded = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "The saved data set" if source.kind == "saved" else "There is no file or folder of that name, and"
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{what} '{source.data}' cannot be loaded as a data set: {type(error).__name__}: {reason}"
        ) from error
    if isinstance(loaded, dict):
        splits = list(loaded)
        split = source.split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
        if split not in loaded:
            raise DataError(f"The data set '{source.data}' has no split '{split}'; it has {', '.join(splits)}.")
        return loaded[split]
    return loaded


def splits_of(source: TextSource) -> list[str]:
    """Names of a data set's splits; an empty list for anything that has none."""
    import datasets

    if source.kind == "saved" and (Path(source.data) / "dataset_dict.json").is_file():
        return list(datasets.load_from_disk(source.data))
    if source.kind == "named":
        name, _, configuration = source.data.partition(":")
        return list(datasets.load_dataset(name, configuration or None))
    return []
