"""Every exception that FastFFN raises on purpose.

Each is a `FastFFNError` and the built-in it specialises, so both `except FastFFNError` and `except ValueError`
work. Messages name what was given, what was expected, and what to do. The command line turns those that the user
can mend into one paragraph and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastFFNError(Exception):
    """Base class of all errors raised by FastFFN."""

    exit_code = 2


class ConfigError(FastFFNError, ValueError):
    """A field of a configuration is unknown, missing or out of range."""


class ShapeError(FastFFNError, ValueError):
    """A tensor does not have the shape that an operation needs."""


class DtypeError(FastFFNError, TypeError):
    """A tensor has a dtype that an operation does not take, or one that differs from its neighbours'."""


class DeviceError(FastFFNError, RuntimeError):
    """Tensors that an operation needs together are on several devices."""


class IndexRangeError(FastFFNError, IndexError):
    """A number that chooses among several things names none of them."""


class BackendError(FastFFNError, RuntimeError):
    """No backend of an operation can run, or the one that was asked for cannot."""


class KindError(FastFFNError, ValueError):
    """A kind of FFN is unknown, or cannot do what was asked of it."""


class ConversionError(FastFFNError, ValueError):
    """A model holds nothing that can be converted or merged."""


class NothingPaysError(ConversionError):
    """No conversion makes the model faster on this machine within the budget of quality."""


class CheckpointError(FastFFNError, ValueError):
    """A checkpoint is missing, corrupt, or not of the kind that was expected."""


class DataError(FastFFNError, ValueError):
    """Text or tokens are missing, unreadable, or too few."""


class OutputError(FastFFNError, FileExistsError):
    """An output directory already holds something else."""


class WriteError(FastFFNError, OSError):
    """A file could not be written to its end: the disk is full, or a limit is reached."""


class MissingDependencyError(FastFFNError, ImportError):
    """An optional package is needed and not installed."""


class TrainingDivergedError(FastFFNError, ArithmeticError):
    """The training loss is no longer a number."""

    exit_code = 1


class MainProcessError(FastFFNError, RuntimeError):
    """The process that decides for all has stopped; it has said why."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MeasurementError(FastFFNError, AssertionError):
    """A result is wrong, so its speed must not be reported."""

    exit_code = 1


def did_you_mean(given: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Returns ` Did you mean 'x'?` for the nearest known name, or an empty string if none is near enough."""
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
