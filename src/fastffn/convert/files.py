"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastffn.errors import CheckpointError, OutputError


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `target` that takes its name if the block ends without an error.

    Raises:
        OutputError: `target` exists already and is not an empty directory.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"{target} exists already; name a new directory, or remove that one.")
    make_directory(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def make_directory(path: Path) -> None:
    """Creates a directory, if need be with those above it.

    Raises:
        OutputError: it cannot be created, or nothing may be written into it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be created ({error.strerror}); name another directory.") from error
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path} may not be written into; name another directory.")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; in the end the file gets its own, unless there was an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    with _new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk: a machine may lose its power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_figure(path: Path, figure: Any) -> None:
    """Writes a figure of matplotlib as a PNG file, whole or not at all."""
    with _new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {path.parent} is not a complete checkpoint.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is unreadable or corrupt ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is corrupt: it holds a {type(value).__name__}, not an object.")
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
