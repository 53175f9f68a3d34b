"""The timer: several things side by side in one process, in alternating blocks, medians of many."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over many calls.

    Attributes:
        median: the middle one.
        low, high: the quartiles: how much this machine wavers.
        calls: how many were timed.
    """

    median: float
    low: float
    high: float
    calls: int


def accelerator() -> torch.device | None:
    """The accelerator, where there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def synchronize() -> None:
    """Waits until the accelerator, where there is one, has done all it was asked."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def free_memory() -> None:
    """Gives back what the accelerator, where there is one, holds for tensors that are gone."""
    gc.collect()
    if torch.accelerator.is_available() and hasattr(torch.accelerator, "empty_cache"):  # from torch 2.9 on
        torch.accelerator.empty_cache()


class OutOfMemory(Exception):  # noqa: N818 (torch has an error of that name)
    """The accelerator's memory did not suffice for the call of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    block: int = 1,
    warmup: int = 1,
    between: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times several calls against each other.

    In every round each takes its turn of `block` calls, and every other round runs in reverse order: drift of the
    machine and caches left warm or cold by a neighbour strike all alike.

    Args:
        calls: what to time, by name.
        rounds: how many rounds.
        block: calls in a row of one kind; the first of a block is not timed if there are several.
        warmup: rounds before timing starts.
        between: is called before each call and not timed, to empty caches for example.

    Returns:
        A `Timing` for each name.

    Raises:
        OutOfMemory: with the name of the call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(warmup + rounds):
        for name in names if number % 2 == 0 else reversed(names):
            for repeat in range(block):
                if between is not None:
                    between()
                synchronize()
                start = time.perf_counter()
                try:
                    calls[name]()
                    synchronize()
                except torch.OutOfMemoryError as error:
                    raise OutOfMemory(name) from error
                elapsed = time.perf_counter() - start
                if number >= warmup and (repeat > 0 or block == 1):
                    seconds[name].append(elapsed)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))
