"""Which way through a tree is cheapest: compiled, walk, cut in two, or evaluate all. A committed rule, not a
measurement at run time: the same call takes the same way on every machine and with any number of threads.

The first estimates below are nanoseconds of a forward pass in float32, one thread, fitted to the measurements that
README.md of this folder shows; those of accelerators are predicted there. They need only be right enough to rank.
"""

from __future__ import annotations

import math
from functools import lru_cache

from fastffn.ops.neuron_tree.request import Request, neurons_of

# Nanoseconds for: one multiply-add of a large product; moving one number of a token into sorted order and back.
PRODUCT, MOVE = 0.025, 0.6
# One level of a walk; one weight that one token gathers there.
WALK_LEVEL, WALK_WEIGHT = 30_000.0, 0.8
# One cut tree; one level of the descent in it; one segment with its two products; one weight gathered for a segment.
TREE, TREE_LEVEL, SEGMENT, SEGMENT_WEIGHT = 80_000.0, 8_000.0, 28_000.0, 0.22
# Compiled: one path; one level of it; one weight of that level.
PATH, PATH_LEVEL, PATH_WEIGHT = 20.0, 5.0, 0.033
# One level of the descent beside the dense product; one weight that it reads.
DENSE_LEVEL, DENSE_WEIGHT = 8_000.0, 0.15


def _walk(tokens: int, trees: int, levels: int, width: int) -> float:
    return levels * (WALK_LEVEL + tokens * trees * width * WALK_WEIGHT)


def _cut(tokens: int, levels: int, width: int, cut: int) -> float:
    """One tree, cut below its `cut` upper levels."""
    upper, lower, subtrees = neurons_of(cut - 1), neurons_of(levels - cut - 1), 2**cut
    # As many subtrees as tokens that fall evenly would meet.
    segments = -subtrees * math.expm1(-tokens / subtrees)
    return (
        TREE
        + levels * TREE_LEVEL
        + tokens * width * (MOVE + (upper + lower) * PRODUCT)
        + segments * (SEGMENT + lower * width * SEGMENT_WEIGHT)
    )


def _compiled(tokens: int, trees: int, levels: int, width: int) -> float:
    return tokens * trees * (PATH + levels * (PATH_LEVEL + width * PATH_WEIGHT))


def _dense(tokens: int, trees: int, levels: int, width: int) -> float:
    weights = trees * neurons_of(levels - 1) * width
    return levels * DENSE_LEVEL + weights * (DENSE_WEIGHT + tokens * PRODUCT)


@lru_cache(maxsize=4096)
def best_cut(tokens: int, levels: int, width: int) -> int:
    """How many levels to evaluate densely, from 1 to `levels - 1`; `width` is D + O."""
    return min(range(1, levels), key=lambda cut: _cut(tokens, levels, width, cut))


@lru_cache(maxsize=4096)
def walks(tokens: int, trees: int, levels: int, width: int) -> bool:
    """Whether so few tokens are better led down their paths, each gathering its own weights."""
    cut = best_cut(tokens, levels, width)
    return _walk(tokens, trees, levels, width) < trees * _cut(tokens, levels, width, cut)


@lru_cache(maxsize=4096)
def cheapest(request: Request) -> str:
    """The name of the backend whose estimate is lowest; a walk is one of `torch_grouped`'s ways."""
    # An accelerator evaluates all neurons of a usual tree in less time than it takes to start the many small products
    # of a cut one. (Reckoned, not measured: a kernel of its own is what an accelerator needs.)
    if request.depth == 0 or request.device != "cpu":
        return "dense"
    tokens, trees, levels = request.tokens, request.trees, request.depth + 1
    width = request.d_model + request.d_out
    cut = trees * _cut(tokens, levels, width, best_cut(tokens, levels, width))
    dense = _dense(tokens, trees, levels, width)
    return "torch_grouped" if min(_walk(tokens, trees, levels, width), cut) < dense else "dense"


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


def why_not(name: str, request: Request) -> str | None:
    """Why the backend called `name` leaves a request to another one; None if it does not."""
    if name == "cpu":
        tokens, trees, levels = request.tokens, request.trees, request.depth + 1
        width = request.d_model + request.d_out
        compiled = _compiled(tokens, trees, levels, width)
        faster = compiled <= _dense(tokens, trees, levels, width)
        return None if faster else "leaves it to dense, which is faster here"
    if name == "triton":
        shape = (request.tokens, request.trees, request.depth + 1, request.d_model + request.d_out)
        ours = levels_time if kernel_for(*shape) == "levels" else path_time
        faster = ours(*shape) <= dense_time(*shape)
        return None if faster else "leaves it to dense, which is predicted to be faster here"
    best = cheapest(request)
    return None if best == name else f"leaves it to {best}, which is faster here"
