"""Texts of data sets of the `datasets` package: directories written by `save_to_disk`, and names, which are streamed.

Streamed means that no copy of the text is stored: of openwebtext's 40 GB only the token blocks are.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastffn.data.files import checked_text, no_column
from fastffn.data.pieces import Piece, pieces_of
from fastffn.errors import DataError, did_you_mean

_WIKITEXT = "Salesforce/wikitext"
# Names of ours -> names on the hub, with the configuration.
KNOWN = {
    "openwebtext": "Skylion007/openwebtext",
    "wikitext": f"{_WIKITEXT}:wikitext-103-raw-v1",
    "wikitext-2": f"{_WIKITEXT}:wikitext-2-raw-v1",
    "wikitext-103": f"{_WIKITEXT}:wikitext-103-raw-v1",
}
_ROWS = 64
# The first line of an article of WikiText: ` = Title = `; those of its sections have more signs.
_ARTICLE = re.compile(r" = [^=\n]+ = \n?")


def hub_name(data: str) -> tuple[str, str | None]:
    """Repository and configuration of `name` or `name:configuration`."""
    name, _, configuration = data.partition(":")
    repository, _, default = KNOWN.get(name, name).partition(":")
    return repository, configuration or default or None


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the directory."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def splits(data: str, *, saved: bool) -> list[str]:
    """Names of a data set's splits; none where it is saved without any."""
    if not saved:
        return list(_resolved(data)["splits"])
    loaded = _saved(data)
    return list(loaded) if isinstance(loaded, dict) else []


def rows_identity(data: str, split: str | None, *, saved: bool) -> str:
    """Text that differs whenever the rows of the split may.

    Raises:
        DataError: there is no such data set or split.
    """
    if saved:
        return str(_rows(data, split, saved=True)._fingerprint)
    found = _resolved(data)
    return f"{found['identity']} {_chosen(data, split, found['splits'])}"


def rows_pieces(data: str, split: str | None, column: str, size: int, *, saved: bool) -> Iterator[Piece]:
    """The documents: rows, or for WikiText, whose rows are lines, articles.

    Raises:
        DataError: there is no such data set, split or column, or reading breaks off.
    """
    texts = _texts(data, split, column, saved=saved)
    if not saved and hub_name(data)[0] == _WIKITEXT:
        texts = _articles(texts)
    for text in texts:
        yield from pieces_of(text, size)


def _texts(data: str, split: str | None, column: str, *, saved: bool) -> Iterator[str]:
    import pyarrow

    rows = _rows(data, split, saved=saved)
    done = 0
    try:
        for table in rows.with_format("arrow").iter(batch_size=_ROWS):
            if column not in table.column_names:
                raise no_column(f"The data set '{data}'", column, table.column_names)
            for text in table.column(column).to_pylist():
                done += 1
                yield checked_text(text, column, f"The data set '{data}', row {done}")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"Reading the data set '{data}' broke off after {done} rows: {_reason(error)}") from error


def _articles(lines: Iterator[str]) -> Iterator[str]:
    article: list[str] = []
    for line in lines:
        if _ARTICLE.fullmatch(line):
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def _rows(data: str, split: str | None, *, saved: bool) -> Any:
    """The rows of a split, or all where there are none."""
    loaded = _saved(data) if saved else _streams(data)
    if not isinstance(loaded, dict):
        return loaded
    return loaded[_chosen(data, split, list(loaded))]


def _chosen(data: str, split: str | None, names: list[str]) -> str:
    name = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if name not in names:
        raise DataError(f"The data set '{data}' has no split '{name}'; it has {', '.join(names)}.")
    return name


def _saved(data: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(data)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"The saved data set '{data}' cannot be loaded as a data set: {_reason(error)}") from error


# Each name is resolved once in a process: it takes several requests, and what is read is what was identified.
@functools.cache
def _builder(data: str) -> Any:
    import datasets

    repository, configuration = hub_name(data)
    if "/" not in repository:
        # At once: without a network the hub's client would try again and again first.
        meant = did_you_mean(repository, [*KNOWN, "python-docs"], cutoff=0.8)
        if meant:
            raise DataError(f"There is no file, folder or data set '{data}'.{meant} On the hub, names are owner/name.")
    try:
        return datasets.load_dataset_builder(repository, configuration)
    except Exception as error:
        raise _not_loaded(data, error) from error


@functools.cache
def _streams(data: str) -> Any:
    builder = _builder(data)
    try:
        return builder.as_streaming_dataset()
    except Exception as error:
        raise _not_loaded(data, error) from error


@functools.cache
def _resolved(data: str) -> dict[str, Any]:
    """Identity and splits of a name; where there is no network, those of the last time: the blocks may be there."""
    import datasets

    note = Path(datasets.config.HF_DATASETS_CACHE) / "fastffn_names" / f"{quote(data, safe='')}.json"
    try:
        splits = list(_streams(data))
    except DataError as error:
        if isinstance(error.__cause__, ConnectionError) and note.is_file():
            found: dict[str, Any] = json.loads(note.read_text())
            return found
        raise
    builder = _builder(data)
    repository, configuration = hub_name(data)
    # Of a data set on the hub, `hash` is the commit, from which it is then streamed.
    found = {"identity": f"{repository} {configuration} {builder.config_id} {builder.hash}", "splits": splits}
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(note)
    return found


def _not_loaded(data: str, error: Exception) -> DataError:
    """Whatever `datasets`, the hub's client or the network throw, to the user it is a name that cannot be loaded."""
    repository, configuration = hub_name(data)
    name = f"'{data}'" if data == repository else f"'{data}' ({repository}, configuration {configuration or 'default'})"
    return DataError(
        f"There is no file or folder of that name, and {name} cannot be loaded as a data set: {_reason(error)}"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
