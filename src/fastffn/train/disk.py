"""A full disk, by whatever error it shows itself, becomes one error that says what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from fastffn.errors import FastFFNError, WriteError

# No space, over quota, larger than files may be.
_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch and safetensors write outside Python, and pass the number on in words at best.
_WORDS = (
    "no space left",
    "file too large",
    "quota exceeded",
    "os error 28",
    "os error 27",
    "os error 122",
    "file write failed",
    "unexpected pos",
)


@contextlib.contextmanager
def full_disk_is_named(output: Path, *, kept: str = "") -> Iterator[None]:
    """Raises WriteError in the place of an error that comes from a full disk.

    Args:
        output: what was being written.
        kept: what remains of it, and what to do; by default that of a run.
    """
    try:
        yield
    except FastFFNError:
        raise
    except Exception as error:
        if not _is_full_disk(error):
            raise
        kept = kept or f"What was complete in {output} is kept. Make room; the same command goes on from there."
        raise WriteError(
            f"The disk is full, or files may not grow as large as needed: {' '.join(str(error).split())[:200]}. {kept}"
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return True
        if any(words in str(error).lower() for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
