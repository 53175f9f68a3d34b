"""Where the time of a neuron tree goes on a CPU: `python benchmarks/account.py NAME [THREADS]`.

1x11 (12 of 4,095 neurons), D = 768, float32, forward, batches of random tokens that take turns:

    call        a tree of one neuron and width 1: everything that does not depend on the work
    work        all tokens take one path, whose rows then stay in the first-level cache; less `call`
    rows        what random paths take more: rows wait in the second level, the third, or memory
    output      what a fresh output takes more than one that is given (`out=`): page faults, where it is large

and beside them `products`, these multiply-adds at the rate of a large product, and `reading`, the distinct rows of all
paths once, at the rate at which a sum reads all weights. Medians of alternating blocks, microseconds.
Writes `benchmarks/results/account/<NAME>.json`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fastffn
from fastffn.convert.files import write_json
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.ops import neuron_tree

RESULTS = Path(__file__).parent / "results" / "account"
TOKENS = (1, 8, 64, 512, 4096, 16384)
D, DEPTH = 768, 11
# Batches that take turns: what is in the caches is the weights' and the last batch's.
BATCHES = 4


def forward(ffn: Any, batches: list[torch.Tensor], given: bool) -> Callable[[], object]:
    """A call with the next batch."""
    turn = itertools.cycle(batches)
    out = torch.empty_like(batches[0])

    def call() -> object:
        return neuron_tree(next(turn), ffn.w_in, ffn.b_in, ffn.w_out, out=out if given else None)

    return call


@torch.no_grad()
def account(tokens: int) -> dict[str, float]:
    """The parts at one number of tokens."""
    ffn = fastffn.build("neuron_tree", d_model=D, depth=DEPTH, trees=1)
    one_path = fastffn.build("neuron_tree", d_model=D, depth=DEPTH, trees=1)
    one_path.load_state_dict(ffn.state_dict())
    one_path.b_in.fill_(-1e3)  # all go left
    tiny = fastffn.build("neuron_tree", d_model=1, depth=0, trees=1)
    batches = [torch.randn(tokens, D) for _ in range(BATCHES)]
    columns, square = torch.randn(2048, D), torch.randn(D, 4 * D)
    found = alternate(
        {
            "fresh": forward(ffn, batches, given=False),
            "one path, fresh": forward(one_path, batches, given=False),
            "one path": forward(one_path, batches, given=True),
            "call": forward(tiny, [torch.randn(1, 1)], given=True),
            "product": lambda: columns @ square,
            "read": lambda: (ffn.w_in.sum(), ffn.w_out.sum()),
        },
        rounds=15,
        block=4,
    )
    time = {name: 1e6 * timing.median for name, timing in found.items()}
    # Nodes met on each level, where tokens fall evenly.
    distinct = sum(2**level * (1 - (1 - 0.5**level) ** tokens) for level in range(DEPTH + 1))
    rate = 2048 * D * 4 * D / time["product"]  # multiply-adds a microsecond
    return {
        "tokens": tokens,
        "total": time["fresh"],
        "call": time["call"],
        "work": time["one path"] - time["call"],
        "rows": time["fresh"] - time["one path, fresh"],
        "output": time["one path, fresh"] - time["one path"],
        "products": tokens * (DEPTH + 1) * 2 * D / rate,
        "reading": time["read"] * distinct / (2 ** (DEPTH + 1) - 1),
    }


def main() -> None:
    """Each number of tokens."""
    torch.manual_seed(0)
    if len(sys.argv) > 2:
        torch.set_num_threads(int(sys.argv[2]))
    rows = [account(tokens) for tokens in TOKENS]
    name = sys.argv[1] if len(sys.argv) > 1 else "here"
    write_json(RESULTS / f"{name}.json", {"microseconds": rows, "machine": describe_machine()})
    print(tabulate(rows, headers="keys", floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    main()
