"""What tells one file's contents from another's."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; once a process, as long as size and time stay.

    Not its path or time: a run goes on where the machine came back with the same files, copied or fetched again.
    """
    status = path.stat()
    return _digest(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, time: int) -> str:
    found = hashlib.sha256()
    # hashlib.file_digest came with Python 3.11.
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
