"""Which way through a tree is cheapest: compiled, walk, cut in two, or evaluate all. A committed rule, not a
measurement at run time: the same call takes the same way on every machine of a kind and with any number of threads.

The estimates below are nanoseconds, fitted to what `python benchmarks/routes.py` measures on a CPU, for each dtype and
pass; those of accelerators are predicted in README.md of this folder. They need only be right enough to rank.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from fastffn.ops.cpu import multiplies_bfloat16
from fastffn.ops.neuron_tree.request import Request, neurons_of


class Compiled(NamedTuple):
    """Nanoseconds of a call, a path, a level of it, a weight that it reads, and a weight's gradient that is written."""

    call: float
    path: float
    level: float
    weight: float
    gradient: float = 0.0


class Dense(NamedTuple):
    """Of a call, a level of the descent, a neuron visited, a weight, a multiply-add, a number of a token."""

    call: float
    level: float
    visit: float
    weight: float
    product: float
    token: float = 0.0


class Cut(NamedTuple):
    """Of a tree, a level of it, a number of a token sorted and put back, a multiply-add, a segment of tokens with its
    products, a weight gathered for it, and a weight's gradient.
    """

    tree: float
    level: float
    move: float
    product: float
    segment: float
    gathered: float
    gradient: float = 0.0


class Walk(NamedTuple):
    """Of a call, a level, and a weight that one token gathers there."""

    call: float
    level: float
    weight: float


class Prices(NamedTuple):
    """What the ways cost in one dtype and pass. Backward there is no walk: it is forward's way for a few tokens."""

    compiled: Compiled
    dense: Dense
    cut: Cut
    walk: Walk


_WALK_32, _WALK_16 = Walk(0, 83_000, 0.8), Walk(120_000, 56_000, 0.74)
_FORWARD_32 = Prices(
    Compiled(6_800, 7.8, 0, 0.038),
    Dense(62_000, 9_500, 5.3, 0.26, 0.024),
    Cut(0, 57_000, 0.9, 0.044, 23_000, 0.26),
    _WALK_32,
)
_BACKWARD_32 = Prices(
    Compiled(18_000, 26, 0, 0.08, 0.19),
    Dense(110_000, 0, 11, 0.87, 0.039, 0.62),
    Cut(64_000, 37_000, 1.0, 0.082, 52_000, 0.63, 0.8),
    _WALK_32,
)
# On a processor with products of bfloat16.
_FORWARD_16 = Prices(
    Compiled(6_500, 9.6, 12, 0.015),
    Dense(88_000, 18_000, 7.4, 0.13, 0.006),
    Cut(0, 48_000, 0.91, 0.016, 98_000, 0.2),
    _WALK_16,
)
_BACKWARD_16 = Prices(
    Compiled(20_000, 46, 7.3, 0.041, 0.086),
    Dense(200_000, 8_100, 22, 0.81, 0.009, 0.19),
    Cut(35_000, 36_000, 1.2, 0.0095, 180_000, 0.56, 0.29),
    _WALK_16,
)


def prices(dtype: torch.dtype, backward: bool) -> Prices:
    """Of one dtype and pass on this processor."""
    wide, narrow = (_BACKWARD_32, _BACKWARD_16) if backward else (_FORWARD_32, _FORWARD_16)
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return narrow
    # Without such products narrow numbers are widened first, which is no faster than wide ones.
    return wide._replace(compiled=narrow.compiled) if dtype.itemsize == 2 else wide


def _walk_time(price: Walk, tokens: int, trees: int, levels: int, width: int) -> float:
    return price.call + levels * (price.level + tokens * trees * width * price.weight)


def _cut_time(price: Cut, tokens: int, levels: int, width: int, cut: int) -> float:
    """One tree, cut below its `cut` upper levels."""
    upper, lower, subtrees = neurons_of(cut - 1), neurons_of(levels - cut - 1), 2**cut
    # As many subtrees as tokens that fall evenly would meet.
    segments = -subtrees * math.expm1(-tokens / subtrees)
    return (
        price.tree
        + levels * price.level
        + tokens * width * (price.move + (upper + lower) * price.product)
        + segments * (price.segment + lower * width * price.gathered)
        + neurons_of(levels - 1) * width * price.gradient
    )


def _compiled_time(price: Compiled, tokens: int, trees: int, levels: int, width: int) -> float:
    each = price.path + levels * (price.level + width * price.weight)
    return price.call + tokens * trees * each + trees * neurons_of(levels - 1) * width * price.gradient


def _dense_time(price: Dense, tokens: int, trees: int, levels: int, width: int) -> float:
    weights = trees * neurons_of(levels - 1) * width
    visits = tokens * trees * levels
    calls = price.call + levels * price.level + visits * price.visit
    return calls + weights * (price.weight + tokens * price.product) + tokens * width * price.token


@lru_cache(maxsize=4096)
def best_cut(tokens: int, levels: int, width: int, dtype: torch.dtype, backward: bool = False) -> int:
    """How many levels to evaluate densely, from 1 to `levels - 1`; `width` is D + O."""
    price = prices(dtype, backward).cut
    return min(range(1, levels), key=lambda cut: _cut_time(price, tokens, levels, width, cut))


@lru_cache(maxsize=4096)
def walks(tokens: int, trees: int, levels: int, width: int, dtype: torch.dtype) -> bool:
    """Whether so few tokens are better led down their paths, each gathering its own weights."""
    price = prices(dtype, backward=False)
    cut = best_cut(tokens, levels, width, dtype)
    walk = _walk_time(price.walk, tokens, trees, levels, width)
    return walk < trees * _cut_time(price.cut, tokens, levels, width, cut)


@lru_cache(maxsize=4096)
def cheapest(request: Request, backward: bool = False) -> str:
    """Of "torch_grouped" (a cut tree; forward also a walk) and "dense", the one whose estimate is lower."""
    # An accelerator evaluates all neurons of a usual tree in less time than it takes to start the many small products
    # of a cut one. (Reckoned, not measured: a kernel of its own is what an accelerator needs.)
    if request.depth == 0 or request.device != "cpu":
        return "dense"
    tokens, trees, levels, width = _shape(request)
    price = prices(request.dtype, backward)
    cut = best_cut(tokens, levels, width, request.dtype, backward)
    sparse = trees * _cut_time(price.cut, tokens, levels, width, cut)
    if not backward:
        sparse = min(sparse, _walk_time(price.walk, tokens, trees, levels, width))
    return "torch_grouped" if sparse < _dense_time(price.dense, tokens, trees, levels, width) else "dense"


def _shape(request: Request) -> tuple[int, int, int, int]:
    return request.tokens, request.trees, request.depth + 1, request.d_model + request.d_out


# The Triton kernels on an H200 in bfloat16, predicted and not measured: README.md of this folder has the arithmetic.
# Nanoseconds for: a launch; a row that a token waits for on its way down; a number read from the second-level cache.
LAUNCH, HOP, CACHED = 2_500.0, 1_500.0, 2 / 5_500
# Two levels of products: what three more launches of sorting wait for; a number read or written; a multiply-add.
SORT, MOVED, MULTIPLIED = 10_000.0, 2 / 3_400, 2 / 400_000
# All neurons in two products and what is between them.
DENSE_LAUNCHES, DENSE_MULTIPLIED, DENSE_READ = 3, 2 / 690_000, 2 / 3_800
# The deepest tree that two products of at most 128 columns evaluate.
MOST_CUT_LEVELS = 14


def together(tokens: int) -> tuple[int, int]:
    """Of the path kernel: tokens of a program, and levels that it looks at before a token moves down.

    Few tokens wait for each hop; many hide each other's waiting, and rows that were not needed cost.
    """
    if tokens <= 256:
        return 1, 3
    return (1, 2) if tokens <= 1024 else (2, 1)


def path_time(tokens: int, trees: int, levels: int, width: int) -> float:
    """Nanoseconds of one launch in which each token goes down its paths; `width` is D + O."""
    _, hop = together(tokens)
    rows = levels * (1 + (2**hop - 1) / hop) / 2  # of w_in all that a hop looks at, of w_out those visited
    return LAUNCH + trees * math.ceil(levels / hop) * HOP + tokens * trees * rows * width * CACHED


def levels_time(tokens: int, trees: int, levels: int, width: int) -> float:
    """Nanoseconds of two products and a sort between them, P launches of the second."""
    upper, lower = 2 ** ((levels + 1) // 2), 2 ** (levels // 2)
    columns = (upper + lower + lower + 16) / 2
    each = 3 * width / 2 * MOVED + columns * width * MULTIPLIED
    return (4 + trees) * LAUNCH + SORT + tokens * trees * each


def dense_time(tokens: int, trees: int, levels: int, width: int) -> float:
    """Nanoseconds of evaluating all neurons."""
    weights = trees * neurons_of(levels - 1) * width
    return DENSE_LAUNCHES * LAUNCH + weights * max(DENSE_READ, tokens * DENSE_MULTIPLIED)


@lru_cache(maxsize=4096)
def kernel_for(tokens: int, trees: int, levels: int, width: int) -> str:
    """Which of the Triton kernels runs: "path" or "levels"."""
    if not 2 <= levels <= MOST_CUT_LEVELS:
        return "path"
    shape = (tokens, trees, levels, width)
    return "levels" if levels_time(*shape) < path_time(*shape) else "path"


def why_not(name: str, request: Request, *, backward: bool = False) -> str | None:
    """Why the backend called `name` leaves a pass of a request to another one; None if it does not."""
    if name == "cpu":
        price, shape = prices(request.dtype, backward), _shape(request)
        faster = _compiled_time(price.compiled, *shape) <= _dense_time(price.dense, *shape)
        return None if faster else "leaves it to dense, which is faster here"
    if name == "triton":
        shape = _shape(request)
        ours = levels_time if kernel_for(*shape) == "levels" else path_time
        faster = ours(*shape) <= dense_time(*shape)
        return None if faster else "leaves it to dense, which is predicted to be faster here"
    best = cheapest(request, backward)
    return None if best == name else f"leaves it to {best}, which is faster here"
