"""What this machine can do at best: multiply-adds a second, bytes read and written a second, fresh memory.

A bound made of these must hold: each figure is the best that was seen, in several tries and several ways.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastffn.measure.timer import synchronize
from fastffn.ops.cpu import prefer_large_pages

# Working sets whose bandwidth is measured, in bytes: from what a core keeps for itself to more than any cache holds.
SIZES = tuple(2**power for power in range(18, 29))
BEYOND_CACHES = SIZES[-1]


@dataclass(frozen=True)
class Limits:
    """The best that a device did, with the threads there were.

    Attributes:
        multiply_adds: in a second, of large matrix products in the dtype asked for or, where that is faster, float32.
        reads, writes: bytes a second, for each of `SIZES`: a working set of so many bytes, gone through repeatedly.
        first_touch: bytes a second of fresh memory written for the first time (page faults), None off the CPU.
    """

    multiply_adds: float
    reads: dict[int, float]
    writes: dict[int, float]
    first_touch: float | None

    def read(self, working_set: float) -> float:
        """Bytes read a second from a working set of so many bytes: that of the next smaller one measured."""
        return _at(self.reads, working_set)

    def write(self, working_set: float) -> float:
        """Bytes written a second; see `read`."""
        return _at(self.writes, working_set)

    def at_least(self, multiply_adds: float) -> Limits:
        """The same, where something else was seen to do so many multiply-adds a second."""
        return replace(self, multiply_adds=max(self.multiply_adds, multiply_adds))


def _at(measured: dict[int, float], working_set: float) -> float:
    smaller = [size for size in measured if size <= working_set]
    return measured[max(smaller, default=min(measured))]


def measure_limits(dtype: torch.dtype, device: torch.device, *, sizes: Sequence[int] = SIZES) -> Limits:
    """Measures the device; some seconds.

    Args:
        dtype: of the products.
        device: where.
        sizes: working sets in bytes.
    """
    reads, writes = {}, {}
    for size in sorted(sizes):
        block = torch.randn(size // 4, device=device)
        seconds = (_best(block.sum, size), _best(block.amax, size))
        reads[size] = size / min(seconds)
        writes[size] = size / _best(partial(block.fill_, 1.0), size)
    dtypes = {dtype, torch.float32}
    return Limits(
        multiply_adds=max(_products(kind, device) for kind in dtypes),
        reads=_falling(reads),
        writes=_falling(writes),
        first_touch=_first_touch() if device.type == "cpu" else None,
    )


def fresh_seconds(sizes: Sequence[int], device: torch.device) -> float:
    """What it costs at least to get so many pieces of memory, beyond writing them: page faults.

    Measured as the allocator is at this moment, pieces of exactly these sizes taken and given back again and again:
    one that recycles them costs nothing.

    Args:
        sizes: in bytes.
        device: zero is returned for anything but a CPU, whose allocators recycle.
    """
    if device.type != "cpu" or not sizes:
        return 0.0
    # Less what the calls themselves cost, which pieces of one byte show. A difference of two figures that waver each:
    # the least of several, since it is to be a bound.
    tries = [
        _fresh_beyond_writing(sizes, large_pages) - _fresh_beyond_writing([1] * len(sizes), large_pages)
        for large_pages in (False, True, False, True)
    ]
    return max(0.0, min(tries))


def _fresh_beyond_writing(sizes: Sequence[int], large_pages: bool) -> float:
    kept = [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def fresh() -> None:
        for piece in [torch.empty(size, dtype=torch.uint8) for size in sizes]:
            if large_pages:
                prefer_large_pages(piece)
            piece.fill_(1)

    def again() -> None:
        for piece in kept:
            piece.fill_(1)

    return _best(fresh, sum(sizes)) - _best(again, sum(sizes))


def _products(dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    # Larger ones where there is more to fill. Both layouts of the second factor.
    for n in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for right in (b, b.T):
            best = max(best, n**3 / _best(partial(torch.mm, a, right, out=out), 2**24))
    return best


def _first_touch() -> float:
    # Above the size from which an allocator maps fresh pages each time (32 MiB for glibc).
    size = 2**26
    return size / _best(lambda: torch.empty(size, dtype=torch.uint8).fill_(1), size)


def _falling(measured: dict[int, float]) -> dict[int, float]:
    """With each size as fast at least as any larger one: small ones are slowed by the call itself."""
    sizes = sorted(measured, reverse=True)
    return dict(zip(sizes, itertools.accumulate((measured[size] for size in sizes), max), strict=True))


def _best(run: Callable[[], object], size: int) -> float:
    """The shortest call, of more of them where they are short."""
    repeats = min(64, max(1, 2**22 // max(size, 1)))
    run()
    best = float("inf")
    for _ in range(9):
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best
