"""Checkpoints of the Trainer that are known to be whole.

The Trainer writes file by file straight into `checkpoint-N` and takes the highest N for the newest. A process may be
killed, or the disk be full, between any two of them. So a file of ours is written last of all, with the size of every
other; what lacks it, or does not agree with it, is not gone on from.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

from fastffn.convert.files import flush, read_json, write_json
from fastffn.errors import CheckpointError

MARK = "complete.json"
# The newest, and one before it should the newest turn out to be damaged.
KEPT = 2


def mark_complete(directory: Path) -> None:
    """Says that a checkpoint is whole, once all of it has reached the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MARK)
    for path in files:
        flush(path)
    write_json(directory / MARK, {str(path.relative_to(directory)): path.stat().st_size for path in files})
    flush(directory)


def why_incomplete(directory: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole."""
    if not directory.is_dir():
        return "it is missing"
    if not (directory / MARK).is_file():
        return "it was not written to its end"
    try:
        sizes = read_json(directory / MARK)
    except CheckpointError as error:
        return str(error).rstrip(".")
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints in a stage's directory, whole or not, the newest first."""
    found = [
        (int(match[1]), path)
        for path in (directory.iterdir() if directory.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_complete(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in a stage's directory, and a sentence on each newer one that is not whole."""
    ignored: list[str] = []
    for path in checkpoints(directory):
        reason = why_incomplete(path)
        if reason is None:
            return path, ignored
        ignored.append(f"{path} is ignored: {reason}.")
    return None, ignored


def remove_old(directory: Path) -> None:
    """Deletes all but the newest whole checkpoints of a stage."""
    whole = 0
    for path in checkpoints(directory):
        if whole >= KEPT:
            remove(path)
        elif why_incomplete(path) is None:
            whole += 1


def remove(directory: Path) -> None:
    """Deletes a checkpoint, or what there is of it; the mark first, so that no half of it passes for a whole."""
    (directory / MARK).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def check_resumable(directory: Path) -> None:
    """Raises CheckpointError, naming the file, if training cannot go on from a checkpoint."""
    check_loadable(directory)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing; training cannot go on from this checkpoint.")


def check_loadable(directory: Path) -> None:
    """Raises CheckpointError, naming the file, if a file of a checkpoint is corrupt or cut short."""
    from fastffn.convert.safetensors_io import TensorReader

    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing.")
    read_json(directory / "config.json")
    TensorReader(directory)
    if (directory / "trainer_state.json").exists():
        read_json(directory / "trainer_state.json")
    # PyTorch's files are zip archives, whose table of contents stands at the end: a cut shows.
    for path in sorted(directory.glob("*.p*t*")):
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is corrupt or cut short.")
