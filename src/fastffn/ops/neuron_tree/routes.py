"""Which way through a tree is cheapest: walk, cut in two, or evaluate all. A committed rule, not a measurement at run
time: the same call takes the same way on every machine and with any number of threads.

The estimates below are nanoseconds of a forward pass on the machine of record (see README.md of this folder). They
need only be right enough to rank.
"""

from __future__ import annotations

from functools import lru_cache

from fastffn.ops.neuron_tree.request import Request, neurons_of

# Nanoseconds. A product of one token with one weight; fetching one weight for a small product of its own; one segment
# with its two products; one level of a walk or descent; moving one number of a token into sorted order and back.
PRODUCT = 0.011
FETCH = 0.3
SEGMENT = 30_000.0
LEVEL = 30_000.0
MOVE = 0.5


def _walk(request: Request) -> float:
    levels, width = request.depth + 1, request.d_model + request.d_out
    return levels * (LEVEL + request.tokens * request.trees * width * FETCH)


def _cut_tree(tokens: int, levels: int, width: int, cut: int) -> float:
    """One tree cut below its `cut` upper levels."""
    upper, lower = neurons_of(cut - 1), neurons_of(levels - cut - 1)
    segments = min(tokens, 2**cut)
    return tokens * (upper + lower) * width * PRODUCT + segments * (SEGMENT + lower * width * FETCH)


@lru_cache(maxsize=4096)
def best_cut(tokens: int, levels: int, width: int) -> int:
    """How many levels to evaluate densely, from 1 to `levels - 1`; the smaller number of two that are equally good."""
    return min(range(1, levels), key=lambda cut: _cut_tree(tokens, levels, width, cut))


def _cut(request: Request) -> float:
    levels, width = request.depth + 1, request.d_model + request.d_out
    tree = _cut_tree(request.tokens, levels, width, best_cut(request.tokens, levels, width))
    return request.trees * (tree + levels * LEVEL + request.tokens * width * MOVE)


def _dense(request: Request) -> float:
    levels, width = request.depth + 1, request.d_model + request.d_out
    weights = request.trees * neurons_of(request.depth) * width
    return levels * LEVEL + weights * max(FETCH, request.tokens * PRODUCT)


@lru_cache(maxsize=4096)
def cheapest(request: Request) -> str:
    """The name of the backend whose estimate is lowest; a walk is one of `torch_grouped`'s ways."""
    if request.depth == 0 or request.device != "cpu":
        # An accelerator evaluates all neurons of a usual tree in less time than it takes to start the many small
        # products of a cut one. (Reckoned, not measured: a kernel of its own is what an accelerator needs.)
        return "dense"
    return "torch_grouped" if min(_walk(request), _cut(request)) < _dense(request) else "dense"


@lru_cache(maxsize=4096)
def walks(tokens: int, trees: int, levels: int, width: int) -> bool:
    """Whether so few tokens are better led down their paths, each gathering its own weights."""
    request = Request("", None, tokens, trees, levels - 1, width, 0)  # type: ignore[arg-type]
    return _walk(request) < _cut(request)


def why_not(name: str, request: Request) -> str | None:
    """Why the backend called `name` leaves a request to another one; None if it does not."""
    best = cheapest(request)
    return None if best == name else f"leaves it to {best}, which is faster here"
