"""Where the time of a neuron tree goes on a CPU: `python benchmarks/account.py NAME [THREADS]`.

1x11 (12 of 4,095 neurons), D = 768, forward, batches of random tokens that take turns: one layer and a stack of twelve
that take turns too, float32 and bfloat16.

    call        a tree of one neuron and width 1: everything that does not depend on the work
    work        all tokens take one path, whose rows then stay in the nearest caches; less `call`
    rows        what random paths take more: rows wait in the second level, the third, or memory
    output      what a fresh output takes more than one that is given (`out=`): page faults, where it is large

and beside them `products`, these multiply-adds at the rate of a large product in this dtype, and `reading`, the
distinct rows of all paths once, at the rate at which all weights are read in order. Medians of alternating blocks, in
microseconds. Then one token again: the module, the operation, the kernel alone. Writes
`benchmarks/results/account/<NAME>.json`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fastffn
from fastffn.convert.files import write_json
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.ops import cpu, neuron_tree

RESULTS = Path(__file__).parent / "results" / "account"
TOKENS = (1, 8, 64, 512, 4096, 16384)
D, DEPTH = 768, 11
# Batches that take turns: what is in the caches is the weights' and the last batch's.
BATCHES = 5


def tree(dtype: torch.dtype, **sizes: int) -> Any:
    """A random one."""
    return fastffn.build("neuron_tree", **({"d_model": D, "depth": DEPTH, "trees": 1} | sizes)).to(dtype)


def forward(ffns: Sequence[Any], batches: list[torch.Tensor], given: bool) -> Callable[[], object]:
    """A call of the next layer with the next batch."""
    turn, layers = itertools.cycle(batches), itertools.cycle(ffns)
    out = torch.empty_like(batches[0])

    def call() -> object:
        ffn = next(layers)
        return neuron_tree(next(turn), ffn.w_in, ffn.b_in, ffn.w_out, out=out if given else None)

    return call


def read_all(ffn: Any) -> None:
    """Reads the weights in order; as whole numbers, whose sum waits for no conversion."""
    for weight in (ffn.w_in, ffn.w_out):
        weight.detach().view(torch.int64).amax()


@torch.no_grad()
def account(tokens: int, layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """The parts at one number of tokens."""
    ffns = [tree(dtype) for _ in range(layers)]
    one_path = [tree(dtype) for _ in range(layers)]
    for ffn in one_path:
        ffn.b_in.fill_(-1e3)  # all go left
    batches = [torch.randn(tokens, D).to(dtype) for _ in range(BATCHES)]
    columns, square = torch.randn(2048, D).to(dtype), torch.randn(D, 4 * D).to(dtype)
    turn = itertools.cycle(ffns)
    found = alternate(
        {
            "fresh": forward(ffns, batches, given=False),
            "one path, fresh": forward(one_path, batches, given=False),
            "one path": forward(one_path, batches, given=True),
            "call": forward([tree(dtype, d_model=1, depth=0)], [torch.randn(1, 1).to(dtype)], given=True),
            "product": lambda: columns @ square,
            "read": lambda: read_all(next(turn)),
        },
        rounds=15,
        block=max(4, layers),
    )
    time = {name: 1e6 * timing.median for name, timing in found.items()}
    # Nodes met on each level, where tokens fall evenly.
    distinct = sum(2**level * (1 - (1 - 0.5**level) ** tokens) for level in range(DEPTH + 1))
    rate = 2048 * D * 4 * D / time["product"]  # multiply-adds a microsecond
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "tokens": tokens,
        "whole": time["fresh"],
        "call": time["call"],
        "work": time["one path"] - time["call"],
        "rows": time["fresh"] - time["one path, fresh"],
        "output": time["one path, fresh"] - time["one path"],
        "products": tokens * (DEPTH + 1) * 2 * D / rate,
        "reading": time["read"] * distinct / (2 ** (DEPTH + 1) - 1),
    }


@torch.no_grad()
def one_token() -> dict[str, float]:
    """Of the whole module, the operation and the compiled kernel, each on the same token again and again."""
    ffn = tree(torch.float32).eval()
    x, y = torch.randn(1, D), torch.empty(1, D)
    weights = (ffn.w_in.detach(), ffn.b_in.detach(), ffn.w_out.detach())
    module, isa = cpu.compiled()
    addresses = [tensor.data_ptr() for tensor in (x, *weights)]
    sizes = (1, 1, DEPTH + 1, D, D, D, torch.get_num_threads())
    number = cpu.activation_number(ffn.config.activation)
    found = alternate(
        {
            "module": lambda: ffn(x),
            "operation": lambda: neuron_tree(x, *weights),
            "kernel": lambda: module.tree_forward(isa, 0, number, *addresses, 0, 0, y.data_ptr(), 0, 0, *sizes),
        },
        rounds=200,
        block=100,
    )
    return {name: 1e6 * timing.median for name, timing in found.items()}


def main() -> None:
    """Each dtype, stack and number of tokens."""
    torch.manual_seed(0)
    if len(sys.argv) > 2:
        torch.set_num_threads(int(sys.argv[2]))
    rows = [
        account(tokens, layers, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for layers in (1, 12)
        for tokens in TOKENS
        if layers == 1 or tokens <= 512
    ]
    token = one_token()
    name = sys.argv[1] if len(sys.argv) > 1 else "here"
    write_json(RESULTS / f"{name}.json", {"microseconds": rows, "one token": token, "machine": describe_machine()})
    print(tabulate(rows, headers="keys", floatfmt=".3g", tablefmt="github"))
    print(tabulate([token], headers="keys", floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    main()
