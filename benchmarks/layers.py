"""One FFN of each factorised kind, and leaf trees, against dense: `python benchmarks/layers.py [NAME]`.

1,024 tokens, float32, GELU; forward, and forward with backward; the baseline is dense eager or compiled, whichever is
faster; medians of alternating blocks in one process. Beside each ratio what FLOPs allow. Peak memory of a training
step is that of one forward and backward. Writes `benchmarks/results/layers/<NAME>.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fastffn
from fastffn.convert.files import write_json
from fastffn.measure.flops import layer_flops
from fastffn.measure.machine import describe_machine
from fastffn.measure.memory import peak_bytes
from fastffn.measure.timer import alternate

RESULTS = Path(__file__).parent / "results" / "layers"
TOKENS = 1024


def compared(kinds: dict[str, tuple[str, dict[str, Any]]], d_model: int, d_hidden: int) -> list[dict[str, Any]]:
    """Each kind against a dense FFN of `d_hidden`."""
    dense = fastffn.build("dense", d_model=d_model, d_hidden=d_hidden)
    modules: dict[str, Any] = {"dense": dense, "dense, compiled": torch.compile(dense)}
    for label, (kind, fields) in kinds.items():
        modules[label] = fastffn.build(kind, d_model=d_model, **fields)
    x = torch.randn(TOKENS, d_model)
    gradient = torch.randn(TOKENS, d_model)

    def forward(module: Any) -> None:
        with torch.no_grad():
            module(x)

    def both(module: Any) -> None:
        module.zero_grad()
        module(x.requires_grad_()).backward(gradient)
        x.grad = None

    seconds = {}
    for name, run in (("forward", forward), ("both", both)):
        calls = {label: lambda run=run, module=module: run(module) for label, module in modules.items()}
        timings = alternate(calls, rounds=9, block=3)
        seconds[name] = {label: timing.median for label, timing in timings.items()}
    best = {name: min(found["dense"], found["dense, compiled"]) for name, found in seconds.items()}
    with torch.device("meta"):
        without_weights = {label: fastffn.build(kind, d_model=d_model, **f) for label, (kind, f) in kinds.items()}
        without_weights["dense"] = fastffn.build("dense", d_model=d_model, d_hidden=d_hidden)
    flops = {label: layer_flops(module, TOKENS, d_model) for label, module in without_weights.items()}
    rows = []
    for label in kinds:
        row: dict[str, Any] = {"d_model": d_model, "d_hidden": d_hidden, "kind": label}
        row["FLOPs allow"] = flops["dense"] / flops[label]
        for name in ("forward", "both"):
            row[f"{name}, times as fast"] = best[name] / seconds[name][label]
        row["MB"] = peak_bytes(lambda module=modules[label]: both(module), x.device) / 1e6
        row["dense MB"] = peak_bytes(lambda: both(dense), x.device) / 1e6
        rows.append(row)
    return rows


def main() -> None:
    """Factorised kinds at two widths; leaf trees of the same total width as dense, soft and straight-through."""
    torch.manual_seed(0)
    rows = []
    for width in (256, 768):
        hidden = 4 * width
        kinds: dict[str, tuple[str, dict[str, Any]]] = {}
        for part in (4, 8):
            kinds[f"low_rank, d / {part}"] = ("low_rank", {"d_hidden": hidden, "rank": width // part})
            kinds[f"block, k = {part}"] = ("block", {"d_hidden": hidden, "blocks": part})
        rows += compared(kinds, width, hidden)
    for decisions in ("soft", "straight_through"):
        fields = {"depth": 4, "leaf_width": 192, "decisions": decisions}
        rows += compared({f"leaf_tree, 16 x 192, {decisions}": ("leaf_tree", fields)}, 768, 3072)
    name = sys.argv[1] if len(sys.argv) > 1 else "here"
    write_json(RESULTS / f"{name}.json", {"rows": rows, "tokens": TOKENS, "machine": describe_machine()})
    print(tabulate(rows, headers="keys", floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    main()
