"""The ways through an operation against each other, and its fixed rule: `python benchmarks/routes.py [NAME]`.

`neuron_tree`: compiled, walk (each token gathers its own weights), cut (two levels of products), dense (all neurons).
`grouped_mlp`: all at once (`grouped_mm`), or one MLP after the other. Forward passes, float32, medians of alternating
blocks, milliseconds. Writes `benchmarks/results/routes/<NAME>.json`.
"""

from __future__ import annotations

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
from fastffn.ops import grouped_mlp, neuron_tree
from fastffn.ops.neuron_tree.op import NEURON_TREE

RESULTS = Path(__file__).parent / "results" / "routes"
# (trees, depth, width, tokens)
TREES = [(1, 11, 768, n) for n in (1, 16, 64, 512, 2048)] + [(1, 8, 768, n) for n in (1, 64, 2048)]
TREES += (
    [(8, 7, 256, n) for n in (16, 64, 2048)]
    + [(32, 4, 768, n) for n in (1, 2048)]
    + [(1, 5, 768, n) for n in (64, 512)]
    + [(64, 2, width, n) for width in (128, 768) for n in (1, 256)]
    + [(64, 1, 768, n) for n in (1, 256)]
    + [(64, 0, 768, n) for n in (1, 256)]
)
# (tokens, MLPs, W) at D = O = 768
GROUPS = [(1, 16, 8), (16, 16, 8), (512, 16, 8), (512, 128, 8), (4096, 16, 8), (4096, 16, 64), (4096, 128, 8)]


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each."""
    return {name: 1e3 * timing.median for name, timing in alternate(calls, rounds=7, block=3).items()}


def asked(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` on one backend."""

    def call() -> None:
        with fastffn.use_backend(backend):
            run()

    return call


def patched(target: str, value: object, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with a rule replaced."""

    def call() -> None:
        with patch(target, lambda *arguments: value):
            run()

    return call


@torch.no_grad()
def trees() -> list[dict[str, Any]]:
    """The ways through each tree, and which one the rule takes."""
    rows = []
    for count, depth, width, tokens in TREES:
        ffn = fastffn.build("neuron_tree", d_model=width, depth=depth, trees=count)
        x = torch.randn(tokens, width)

        def run(x: torch.Tensor = x, ffn: Any = ffn) -> None:
            neuron_tree(x, ffn.w_in, ffn.b_in, ffn.w_out)

        cut = patched("fastffn.ops.neuron_tree.torch_grouped.walks", False, asked("torch_grouped", run))
        calls = {"compiled": asked("cpu", run), "dense": asked("dense", run)}
        if depth > 0:
            calls["cut"] = cut
        if tokens * count <= 512:
            calls["walk"] = asked("reference", run)
        calls["rule"] = run
        rows.append({"trees": count, "depth": depth, "width": width, "tokens": tokens, **timed(calls)})
    return rows


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
        rows.append({"tokens": tokens, "mlps": mlps, "W": width, **timed(calls)})
    return rows


def main() -> None:
    """Both operations."""
    torch.manual_seed(0)
    result = {NEURON_TREE.name: trees(), "grouped_mlp": groups(), "machine": describe_machine()}
    write_json(RESULTS / f"{sys.argv[1] if len(sys.argv) > 1 else 'here'}.json", result)
    for name in (NEURON_TREE.name, "grouped_mlp"):
        print(f"\n{name}\n{tabulate(result[name], headers='keys', floatfmt='.3g', tablefmt='github')}")


if __name__ == "__main__":
    main()
