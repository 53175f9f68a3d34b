r"""The ways through an operation against each other, and its fixed rule.

    python benchmarks/routes.py measure
    python benchmarks/routes.py check NAME [THREADS]

`neuron_tree`: compiled, walk (each token gathers its own weights; forward only), cut (two levels of products), dense
(all neurons). `measure` times them with one thread and two on the points of the table that the rule reads
(`fastffn/ops/neuron_tree/crossovers.json`) and writes the rows of this kind of processor; the AVX2 rows:

    FASTFFN_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        python benchmarks/routes.py measure

(avx512: FASTFFN_CPU_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI). `check` times them in between those points, and
says how much slower than the fastest way is what the rule takes, with the compiled kernels and without; and
`grouped_mlp`, forward: all at once (`grouped_mm`), or one MLP after the other. Medians of alternating blocks. Writes
`benchmarks/results/routes/<NAME>.json`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tabulate import tabulate

import fastffn
from fastffn.convert.files import write_json, write_text
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.ops import grouped_mlp
from fastffn.ops.neuron_tree import cpu, crossovers, dense, routes, torch_grouped
from fastffn.ops.neuron_tree.request import Request, request_of

RESULTS = Path(__file__).parent / "results" / "routes"
TABLE = Path(crossovers.__file__).with_name(crossovers.FILE)
# The points of the table: D = O, trees, depth, tokens.
POINTS = {
    "width": (128, 768),
    "trees": (1, 4, 16, 64),
    "depth": (0, 1, 2, 3, 4, 6, 8, 11),
    "tokens": (1, 8, 64, 512, 4096),
}
# What `check` looks at, in between them.
CHECKED = {"width": (384,), "trees": (1, 2, 8, 32), "depth": (0, 1, 2, 3, 5, 7), "tokens": (3, 24, 200, 1500, 4096)}
# Multiply-adds of the dense way through several trees, numbers gathered by a walk: what takes long and is decided.
MOST, MOST_GATHERED = 4e9, 4e7
# (tokens, MLPs, W) at D = O = 768
GROUPS = [(1, 16, 8), (16, 16, 8), (512, 16, 8), (512, 128, 8), (4096, 16, 8), (4096, 16, 64), (4096, 128, 8)]
# Where torch has no products of float16 they are as slow as those of bfloat16 without instructions for it.
DTYPES = (torch.float32, torch.bfloat16) + (torch.float16,) * torch.ops.mkldnn._is_mkldnn_fp16_supported()


def patched(target: str, value: object, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with a rule replaced."""

    def call() -> None:
        with patch(target, lambda *arguments: value):
            run()

    return call


def timed(calls: dict[str, Callable[[], object]], unit: float) -> dict[str, float]:
    """The median of each in a unit, such as 1e-3 s; short calls are made more often."""
    found = alternate(calls, rounds=1)
    whole = sum(timing.median for timing in found.values())
    if whole < 0.1:
        found = alternate(calls, rounds=11 if whole < 5e-3 else 3, block=2)
    return {name: timing.median / unit for name, timing in found.items()}


Case = tuple[dict[str, Any], tuple[Any, ...], torch.Tensor]


def cases(points: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[Case | dict[str, Any]]:
    """For each shape its numbers, the arguments of a call and the gradient of y; its numbers alone if it takes long."""
    for width in points["width"]:
        for trees in points["trees"]:
            for depth in points["depth"]:
                ffn = None
                for tokens in points["tokens"]:
                    shape = {"dtype": str(dtype)[6:], "trees": trees, "depth": depth, "D": width, "tokens": tokens}
                    if trees > 1 and tokens * trees * width * 2 ** (depth + 2) > MOST:
                        yield shape
                        continue
                    if ffn is None:
                        ffn = fastffn.build("neuron_tree", d_model=width, depth=depth, trees=trees).to(dtype)
                    x, gradient = torch.randn(2, tokens, width).to(dtype).unbind()
                    yield shape, (x, ffn.w_in, ffn.b_in, ffn.w_out, ffn.config.activation, False), gradient


def ways(case: tuple[Any, ...], gradient: torch.Tensor, backward: bool) -> dict[str, Callable[[], object]]:
    """One pass by every way that there is."""
    if backward:
        _, scores, last = cpu.forward(*case, keep=True, out=None)
        run = {
            impl.name: lambda impl=impl: impl.backward(gradient, *case, scores, last, needs=(True,) * 4)
            for impl in (cpu.IMPL, torch_grouped.IMPL, dense.IMPL)
        }
    else:
        run = {
            impl.name: lambda impl=impl: impl.forward(*case, keep=False, out=None)
            for impl in (cpu.IMPL, torch_grouped.IMPL, dense.IMPL)
        }
    calls = {"compiled": run["cpu"], "dense": run["dense"]}
    request = request_of(*case)
    if request.depth:
        rule = "fastffn.ops.neuron_tree.torch_grouped.walks"
        calls["cut"] = patched(rule, False, run["torch_grouped"])
        if not backward and request.tokens * request.trees * request.d_model * (request.depth + 1) <= MOST_GATHERED:
            calls["walk"] = patched(rule, True, run["torch_grouped"])
    return calls


@torch.no_grad()
def measure() -> None:
    """Writes the rows of this kind of processor."""
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for name, backward in (("forward", False), ("backward", True)):
            rows = []
            for case in cases(POINTS, dtype):
                row: dict[str, float] = {}
                if isinstance(case, tuple):
                    for threads in (1, 2):
                        torch.set_num_threads(threads)
                        times = timed(ways(*case[1:], backward), 1e-6)
                        row = {way: max(row.get(way, 0), times[way] / times["dense"]) for way in times}
                rows.append(row)
            names = ("compiled", "cut") if backward else ("compiled", "cut", "walk")
            found.setdefault(str(dtype)[6:], {})[name] = {way: filled([row.get(way) for row in rows]) for way in names}
            print(dtype, name, flush=True)
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else {}
    table["axes"] = POINTS | {"width": [2 * width for width in POINTS["width"]]}
    table[crossovers.processor()] = found | {"machine": describe_machine()}
    # Each list on a line of its own.
    text = re.sub(
        r"\[\s+([-+.e\d,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", json.dumps(table, indent=1)
    )
    write_text(TABLE, text + "\n")


def filled(values: list[float | None]) -> list[float]:
    """`POINTS` in order, what was not measured reckoned: with more tokens a ratio changes as it does with fewer trees.

    Where nothing was measured with fewer trees it stays as it is, and where there are no levels to cut it is that of
    depth 1, which nobody asks for.
    """
    sizes = [len(points) for points in POINTS.values()]
    steps = dict(zip(POINTS, (math.prod(sizes[place + 1 :]) for place in range(4)), strict=True))
    for index in range(len(values)):
        tokens, trees = index % sizes[3], index // steps["trees"] % sizes[1]
        if values[index] is None and index // steps["depth"] % sizes[2] > 0:
            before, fewer = (values[index - 1] if tokens else None), index - steps["trees"]
            change = values[fewer] / values[fewer - 1] if tokens and trees else 1.0
            values[index] = before * change if before is not None else values[fewer]
    values = [values[index + steps["depth"]] if value is None else value for index, value in enumerate(values)]
    return [float(f"{value:.3g}") for value in values if value is not None]


@torch.no_grad()
def check() -> list[dict[str, Any]]:
    """The ways through each tree, and which one the rule takes."""
    rows = []
    for dtype in DTYPES:
        for case in cases(CHECKED, dtype):
            if isinstance(case, tuple):
                shape, arguments, gradient = case
                rows += [shape | checked(arguments, gradient, backward) for backward in (False, True)]
    return rows


def checked(case: tuple[Any, ...], gradient: torch.Tensor, backward: bool) -> dict[str, Any]:
    """One pass by every way, and by the rule."""
    request = request_of(*case)
    uncompiled = way(request, backward)
    chosen = "compiled" if routes.why_not("cpu", request, backward=backward) is None else uncompiled
    found = timed(ways(case, gradient, backward), 1e-6)
    if uncompiled not in found:
        uncompiled = "cut"
    others = [time for name, time in found.items() if name != "compiled"]
    return {
        "pass": "backward" if backward else "forward",
        **found,
        "rule": chosen,
        "too slow by": found[chosen] / min(found.values()),
        "times dense": found[chosen] / found["dense"],
        "not compiled, too slow by": found[uncompiled] / min(others),
    }


def way(request: Request, backward: bool) -> str:
    """What the rule takes of the ways that need no compiled kernels."""
    if routes.cheapest(request, backward) == "dense":
        return "dense"
    return "walk" if not backward and routes.walks(request) else "cut"


def regrets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dtype and pass how often, and by how much, the rule does not take the fastest way."""
    table = []
    for dtype, name in dict.fromkeys((row["dtype"], row["pass"]) for row in rows):
        for column in ("too slow by", "not compiled, too slow by"):
            own = [row[column] for row in rows if (row["dtype"], row["pass"]) == (dtype, name)]
            table.append(
                {"dtype": dtype, "pass": name, "rule": column, "calls": len(own), "worst": max(own)}
                | {"slower than the fastest by a tenth": sum(value > 1.1 for value in own)}
                | {"geometric mean": statistics.geometric_mean(own)}
            )
    return table


def slower_than_dense(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dtype and pass how often, and by how much, the rule is slower than dense."""
    table = []
    for dtype, name in dict.fromkeys((row["dtype"], row["pass"]) for row in rows):
        own = [row["times dense"] for row in rows if (row["dtype"], row["pass"]) == (dtype, name)]
        table.append(
            {"dtype": dtype, "pass": name, "calls": len(own), "by a tenth": sum(value > 1.1 for value in own)}
            | {"worst": max(own)}
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
    """`measure`, or `check` of both operations."""
    torch.manual_seed(0)
    match sys.argv[1:]:
        case ["measure"]:
            measure()
        case ["check", name, *threads]:
            if threads:
                torch.set_num_threads(int(threads[0]))
            rows = check()
            result = {
                "regrets": regrets(rows),
                "slower than dense": slower_than_dense(rows),
                "neuron_tree": rows,
                "grouped_mlp": groups(),
                "machine": describe_machine(),
            }
            write_json(RESULTS / f"{name}.json", result)
            for part in ("neuron_tree", "regrets", "slower than dense", "grouped_mlp"):
                print(f"\n{part}\n{tabulate(result[part], headers='keys', floatfmt='.3g', tablefmt='github')}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
