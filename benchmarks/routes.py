"""The ways through an operation against each other, and its fixed rule: `python benchmarks/routes.py NAME [THREADS]`.

`neuron_tree`, each pass alone, float32 and bfloat16, microseconds: compiled, walk (each token gathers its own weights;
forward only), cut (two levels of products), dense (all neurons); and how much slower than the fastest of them is what
the rule takes, with the compiled kernels and without. `grouped_mlp`, forward, milliseconds: all at once (`grouped_mm`),
or one MLP after the other. Medians of alternating blocks. Writes `benchmarks/results/routes/<NAME>.json`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tabulate import tabulate

import fastffn
from fastffn.convert.files import write_json
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.ops import grouped_mlp
from fastffn.ops.neuron_tree import cpu, dense, routes, torch_grouped
from fastffn.ops.neuron_tree.request import request_of

RESULTS = Path(__file__).parent / "results" / "routes"
# (trees, depth), where a way may overtake another, and what is used most.
TREES = [(64, d) for d in (0, 1, 2, 3)] + [(16, d) for d in (0, 1, 2, 3, 4)] + [(4, d) for d in (1, 2, 3, 4, 6)]
TREES += [(1, d) for d in (1, 2, 3, 4, 5, 7, 8, 11)] + [(8, 8)]
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
# Multiply-adds of the dense way, numbers gathered by a walk: what would take long and is decided already.
MOST, MOST_GATHERED = 8e8, 2e7
# (tokens, MLPs, W) at D = O = 768
GROUPS = [(1, 16, 8), (16, 16, 8), (512, 16, 8), (512, 128, 8), (4096, 16, 8), (4096, 16, 64), (4096, 128, 8)]


def patched(target: str, value: object, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with a rule replaced."""

    def call() -> None:
        with patch(target, lambda *arguments: value):
            run()

    return call


def timed(calls: dict[str, Callable[[], object]], unit: float) -> dict[str, float]:
    """The median of each in a unit, such as 1e-3 s."""
    return {name: timing.median / unit for name, timing in alternate(calls, rounds=3, block=2).items()}


@torch.no_grad()
def trees() -> list[dict[str, Any]]:
    """The ways through each tree, and which one the rule takes."""
    rows = []
    for dtype, width in ((dtype, width) for dtype in (torch.float32, torch.bfloat16) for width in (128, 768)):
        for count, depth in TREES:
            ffn = fastffn.build("neuron_tree", d_model=width, depth=depth, trees=count).to(dtype)
            for tokens in TOKENS:
                x, gradient = torch.randn(2, tokens, width).to(dtype).unbind()
                case = (x, ffn.w_in, ffn.b_in, ffn.w_out, ffn.config.activation, False)
                row = {"dtype": str(dtype)[6:], "trees": count, "depth": depth, "D": width, "tokens": tokens}
                rows += [row | tree_pass(case, gradient, backward) for backward in (False, True)]
    return rows


def tree_pass(case: tuple[Any, ...], gradient: torch.Tensor, backward: bool) -> dict[str, Any]:
    """One pass by every way that is worth a try, and by the rule."""
    request = request_of(*case)
    if backward:
        _, scores, last = cpu.forward(*case, keep=True, out=None)
        runs = {
            impl.name: lambda impl=impl: impl.backward(gradient, *case, scores, last, needs=(True,) * 4)
            for impl in (cpu.IMPL, torch_grouped.IMPL, dense.IMPL)
        }
    else:
        runs = {
            impl.name: lambda impl=impl: impl.forward(*case, keep=False, out=None)
            for impl in (cpu.IMPL, torch_grouped.IMPL, dense.IMPL)
        }
    uncompiled = way(request, backward)
    chosen = "compiled" if routes.why_not("cpu", request, backward=backward) is None else uncompiled
    each = request.tokens * request.trees * request.d_model
    calls = {"compiled": runs["cpu"]}
    if uncompiled == "dense" or each * 2 ** (request.depth + 1) <= MOST:
        calls["dense"] = runs["dense"]
    if request.depth:
        rule = "fastffn.ops.neuron_tree.torch_grouped.walks"
        calls["cut"] = patched(rule, False, runs["torch_grouped"])
        if uncompiled == "walk" or (not backward and each * (request.depth + 1) <= MOST_GATHERED):
            calls["walk"] = patched(rule, True, runs["torch_grouped"])
    found = timed(calls, 1e-6)
    others = [time for name, time in found.items() if name != "compiled"]
    return {
        "pass": "backward" if backward else "forward",
        **found,
        "rule": chosen,
        "too slow by": found[chosen] / min(found.values()),
        "not compiled, too slow by": found[uncompiled] / min(others),
    }


def way(request: Any, backward: bool) -> str:
    """What the rule takes of the ways that need no compiled kernels."""
    if routes.cheapest(request, backward) == "dense":
        return "dense"
    shape = (request.tokens, request.trees, request.depth + 1, request.d_model + request.d_out)
    return "walk" if not backward and routes.walks(*shape, request.dtype) else "cut"


def regrets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dtype and pass how often, and by how much, the rule does not take the fastest way."""
    table = []
    for dtype, name in ((dtype, name) for dtype in ("float32", "bfloat16") for name in ("forward", "backward")):
        for column in ("too slow by", "not compiled, too slow by"):
            own = [row[column] for row in rows if (row["dtype"], row["pass"]) == (dtype, name)]
            table.append(
                {"dtype": dtype, "pass": name, "rule": column, "calls": len(own), "worst": max(own)}
                | {"slower than the fastest by a tenth": sum(value > 1.1 for value in own)}
                | {"geometric mean": statistics.geometric_mean(own)}
            )
    return table


@torch.no_grad()
def groups() -> list[dict[str, Any]]:
    """Both ways through the MLPs, tokens spread at random."""
    rows = []
    for tokens, mlps, width in GROUPS:
        x, index = torch.randn(tokens, 768), torch.randint(0, mlps, (tokens,))
        up, down = torch.randn(mlps, width, 768) / 28, torch.randn(mlps, 768, width) / width**0.5
        biases = torch.randn(mlps, width), torch.randn(mlps, 768)

        def run(x: Any = x, index: Any = index, up: Any = up, down: Any = down, biases: Any = biases) -> None:
            grouped_mlp(x, index, up, biases[0], down, biases[1])

        rule = "fastffn.ops.grouped_mlp.torch_grouped._at_once"
        calls = {"at once": patched(rule, True, run), "one by one": patched(rule, False, run), "rule": run}
        rows.append({"tokens": tokens, "mlps": mlps, "W": width, **timed(calls, 1e-3)})
    return rows


def main() -> None:
    """Both operations."""
    torch.manual_seed(0)
    name = sys.argv[1] if len(sys.argv) > 1 else "here"
    if len(sys.argv) > 2:
        torch.set_num_threads(int(sys.argv[2]))
    rows = trees()
    result = {"regrets": regrets(rows), "neuron_tree": rows, "grouped_mlp": groups(), "machine": describe_machine()}
    write_json(RESULTS / f"{name}.json", result)
    for part in ("neuron_tree", "regrets", "grouped_mlp"):
        print(f"\n{part}\n{tabulate(result[part], headers='keys', floatfmt='.3g', tablefmt='github')}")


if __name__ == "__main__":
    main()
