"""Which way through a tree is cheapest: compiled, walk, cut in two, or evaluate all. A committed rule, not a
measurement at run time: the same call takes the same way on every machine of a kind and with any number of threads.

On a CPU the ways are ranked by the table of `crossovers.py`, and where to cut a tree by an estimate. What accelerators
do is predicted in README.md of this folder.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from fastffn.ops.cpu import multiplies_bfloat16
from fastffn.ops.neuron_tree.crossovers import times_dense
from fastffn.ops.neuron_tree.masked import tokens_of_chunk
from fastffn.ops.neuron_tree.request import Request, neurons_of

# Of the fastest other way's time: compiled kernels run where the table says so little. What is within its error is left
# to torch's operators.
MARGIN = 0.85


class Cut(NamedTuple):
    """Nanoseconds of a multiply-add, of a segment of tokens with its products, and of a weight gathered for it."""

    product: float
    segment: float
    gathered: float


# In float32 and in bfloat16 on a processor that multiplies it, forward and backward.
_WIDE = Cut(0.044, 23_000, 0.26), Cut(0.082, 52_000, 0.63)
_NARROW = Cut(0.016, 98_000, 0.2), Cut(0.0095, 180_000, 0.56)


def _cut_time(price: Cut, tokens: int, levels: int, width: int, cut: int) -> float:
    """What depends on the level below which a tree is cut."""
    upper, lower, subtrees = neurons_of(cut - 1), neurons_of(levels - cut - 1), 2**cut
    # As many subtrees as tokens that fall evenly would meet.
    segments = -subtrees * math.expm1(-tokens / subtrees)
    return tokens * width * (upper + lower) * price.product + segments * (
        price.segment + lower * width * price.gathered
    )


@lru_cache(maxsize=4096)
def best_cut(tokens: int, levels: int, width: int, dtype: torch.dtype, backward: bool = False) -> int:
    """How many levels to evaluate densely, from 1 to `levels - 1`; `width` is D + O."""
    price = (_NARROW if dtype == torch.bfloat16 and multiplies_bfloat16() else _WIDE)[backward]
    return min(range(1, levels), key=lambda cut: _cut_time(price, tokens, levels, width, cut))


def walks(request: Request) -> bool:
    """Whether so few tokens are better led down their paths, each gathering its own weights."""
    return times_dense("walk", request, False) < times_dense("cut", request, False)


@lru_cache(maxsize=4096)
def cheapest(request: Request, backward: bool = False) -> str:
    """Of "torch_grouped" (a cut tree; forward also a walk) and "dense", the one that takes less time."""
    # An accelerator evaluates all neurons of a usual tree in less time than it takes to start the many small products
    # of a cut one. (Reckoned, not measured: a kernel of its own is what an accelerator needs.)
    if request.depth == 0 or request.device != "cpu":
        return "dense"
    ways = _ways(request, backward)
    return "torch_grouped" if min(times_dense(way, request, backward) for way in ways) < 1 else "dense"


def _ways(request: Request, backward: bool) -> tuple[str, ...]:
    """Those of `torch_grouped`."""
    if request.depth == 0:
        return ()
    return ("cut",) if backward else ("cut", "walk")


def _shape(request: Request) -> tuple[int, int, int, int]:
    return request.tokens, request.trees, request.depth + 1, request.d_model + request.d_out


# The Triton kernels on an H200 in bfloat16, predicted and not measured: README.md of this folder has the arithmetic.
# Nanoseconds for: a launch; a row that a token waits for on its way down; a number read from the second-level cache.
LAUNCH, HOP, CACHED = 2_500.0, 1_500.0, 2 / 5_500
# Two levels of products: what three more launches of sorting wait for; a number read or written; a multiply-add.
SORT, MOVED, MULTIPLIED = 10_000.0, 2 / 3_400, 2 / 400_000
# All neurons in two products and what is between them.
DENSE_LAUNCHES, DENSE_MULTIPLIED, DENSE_READ = 3, 2 / 690_000, 2 / 3_800
# Of the descent and the mask by torch's operators, counted: launches for a level, and beside; times that a number is
# moved: scores and hidden activations, written and read.
MASK_LEVEL_LAUNCHES, MASK_LAUNCHES, MASK_MOVES = 5, 6, 4
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
    """Nanoseconds of a dense FFN with as many neurons."""
    weights = trees * neurons_of(levels - 1) * width
    return DENSE_LAUNCHES * LAUNCH + weights * max(DENSE_READ, tokens * DENSE_MULTIPLIED)


def masked_time(tokens: int, trees: int, levels: int, width: int) -> float:
    """Nanoseconds of the backend `dense`: such an FFN, and in each chunk of tokens a descent and a mask."""
    neurons = trees * neurons_of(levels - 1)
    chunks = math.ceil(tokens / tokens_of_chunk(neurons))
    mask = chunks * (levels * MASK_LEVEL_LAUNCHES + MASK_LAUNCHES) * LAUNCH + MASK_MOVES * tokens * neurons * MOVED
    return dense_time(tokens, trees, levels, width) + mask


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
        best = min([1.0, *(times_dense(way, request, backward) for way in _ways(request, backward))])
        fastest = times_dense("compiled", request, backward) <= MARGIN * best
        return None if fastest else f"leaves it to {cheapest(request, backward)}, which is faster here"
    if name == "triton":
        shape = _shape(request)
        ours = levels_time if kernel_for(*shape) == "levels" else path_time
        faster = ours(*shape) <= masked_time(*shape)
        return None if faster else "leaves it to dense, which is predicted to be faster here"
    other = cheapest(request, backward)
    return None if other == name else f"leaves it to {other}, which is faster here"
