"""An experiment in cells: each finished one is a small JSON file, so the same command goes on with what is missing."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastffn.convert.files import read_json, write_json
from fastffn.errors import OutputError
from fastffn.train.rundir import locked

SETTINGS = "experiment.json"
FOLDER = "cells"


class Cells:
    """The finished cells of an experiment; made by `opened`."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returned for the cell `name`, now or in an earlier attempt.

        Raises:
            CheckpointError: the cell's file is corrupt; the message names it.
        """
        path = self.output / FOLDER / f"{name}.json"
        if not path.is_file():
            write_json(path, make())
        return read_json(path)


def together(name: str, parts: Iterable[str]) -> str:
    """The name of a cell that compares `parts`: another one where more or fewer are compared."""
    return f"{name}-{zlib.crc32(' '.join(parts).encode()):08x}"


@contextlib.contextmanager
def opened(output: Path, settings: dict[str, Any]) -> Iterator[Cells]:
    """Yields the cells in `output`; nobody else writes there meanwhile.

    Args:
        output: directory, created if need be.
        settings: whatever the content of a cell depends on and its name does not tell, as JSON.

    Raises:
        OutputError: `output` holds cells with other settings, something else, or another process works in it.
    """
    with locked(output):
        path = output / SETTINGS
        if path.is_file():
            before = read_json(path)
            different = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            if different:
                raise OutputError(
                    f"{output} holds an experiment with other settings: "
                    + "; ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in different)
                    + ". Name another directory, or give the same settings to go on with it."
                )
        else:
            there = [found.name for found in output.iterdir() if not found.name.startswith(".")]
            if there:
                raise OutputError(
                    f"{output} is not empty and holds no such experiment ({', '.join(sorted(there)[:5])}); name "
                    "another directory."
                )
            write_json(path, settings)
        yield Cells(output)
