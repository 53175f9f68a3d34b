"""How long each way through a tree takes on a CPU, as a multiple of evaluating all neurons: a committed table, measured
by `python benchmarks/routes.py measure` for each kind of processor, dtype and pass, and read between its points.

A number is the worse one of one thread and two, so that a way that is taken pays with either.
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

from fastffn.ops import cpu
from fastffn.ops.neuron_tree.request import Request

FILE = "crossovers.json"
# What is looked up where nobody has measured. AVX-512 is the same with or without products of bfloat16, in float32;
# in bfloat16 dense is slower without, how much depends on the processor: what leaves most to dense holds everywhere.
# Most processors multiply float16 as slowly as bfloat16 where they have no such products.
WIDE, WIDE_512 = ("avx2", "float32"), ("avx512_bf16", "float32")
NARROW, SLOW_NARROW = ("avx512_bf16", "bfloat16"), ("avx2", "bfloat16")


def coordinates(width: int, trees: int, depth: int, tokens: int) -> tuple[float, float, float, float]:
    """Where a shape lies among the table's points; `width` is D + O."""
    return math.log2(width), math.log2(trees), float(depth), math.log2(max(tokens, 1))


@lru_cache
def _points() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath(FILE).read_text("utf-8"))


@lru_cache
def axes() -> tuple[list[float], ...]:
    """The table's points on each of the four axes of `coordinates`."""
    shape = _points()["axes"]
    widths, trees, depths, tokens = (shape[name] for name in ("width", "trees", "depth", "tokens"))
    return (
        [math.log2(n) for n in widths],
        [math.log2(n) for n in trees],
        [float(n) for n in depths],
        [math.log2(n) for n in tokens],
    )


@lru_cache
def processor() -> str:
    """The kind of processor: the instruction set that the compiled kernels run, or would if they were there.

    "avx512_amx" are those whose matrix products have an instruction set of their own beside it.
    """
    names = cpu.instruction_sets()
    if names:
        own = names[cpu.compiled().isa]
    elif torch.backends.cpu.get_cpu_capability() != "AVX512":
        own = "avx2"
    else:
        own = "avx512_bf16" if cpu.multiplies_bfloat16() else "avx512"
    return "avx512_amx" if own == "avx512_bf16" and cpu.multiplies_tiles() else own


def row_of(kind: str, dtype: torch.dtype) -> tuple[str, str]:
    """Kind of processor and dtype whose row is looked up."""
    own = (kind, str(dtype).removeprefix("torch."))
    if own[1] in _points().get(kind, ()):
        return own
    if dtype == torch.bfloat16:
        return NARROW
    if dtype == torch.float16:
        return SLOW_NARROW
    if kind in _points():
        return kind, "float32"
    return WIDE_512 if kind.startswith("avx512") else WIDE


@lru_cache(maxsize=4096)
def times_dense(way: str, request: Request, backward: bool) -> float:
    """Seconds that a way ("compiled", "cut" or, forward only, "walk") takes, over those of evaluating all neurons.

    Outside of the table's points its nearest one holds.
    """
    kind, dtype = row_of(processor(), request.dtype)
    ratios = _points()[kind][dtype]["backward" if backward else "forward"][way]
    at = coordinates(request.d_model + request.d_out, request.trees, request.depth, request.tokens)
    corners = [_around(axis, value) for axis, value in zip(axes(), at, strict=True)]
    total = 0.0
    for corner in itertools.product(*corners):
        index, weight = 0, 1.0
        for (position, share), axis in zip(corner, axes(), strict=True):
            index, weight = index * len(axis) + position, weight * share
        if weight:
            total += weight * math.log(ratios[index])
    return math.exp(total)


def _around(axis: list[float], value: float) -> list[tuple[int, float]]:
    """The positions of the two points around a value, and the share of each."""
    upper = min(max(bisect_right(axis, value), 1), len(axis) - 1)
    low, high = axis[upper - 1], axis[upper]
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return [(upper - 1, 1 - share), (upper, share)]
