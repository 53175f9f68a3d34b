"""One neuron tree against the best dense FFN of as many neurons, on this machine's CPU; with bounds.

    python benchmarks/neuron_tree.py epyc-2cores

Writes `benchmarks/results/neuron_tree/<NAME>.json` and prints a table. The baseline is dense eager or compiled,
whichever is faster. The gate comes first: what is not right is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

import fastffn
from fastffn.convert.files import write_json
from fastffn.measure.gate import gate
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.ops import neuron_tree
from fastffn.ops.neuron_tree import IMPLS, reference

RESULTS = Path(__file__).parent / "results" / "neuron_tree"


def best_seconds(run: Callable[[], object], times: int = 7) -> float:
    """The shortest of several calls."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    run()
    return min(once() for _ in range(times))


def limits() -> tuple[float, float]:
    """Multiply-adds and bytes read a second: a large product, and a sum over more than any cache holds."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    long = torch.randn(2**26)
    return 2048**3 / best_seconds(lambda: a @ b), long.nbytes / best_seconds(lambda: long.sum())


def main() -> None:
    """Gate, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="here", help="which machine it was")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512, 4096])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--depth", type=int, default=11)
    parser.add_argument("--trees", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="torch_grouped", choices=[impl.name for impl in IMPLS])
    parser.add_argument("--forward-only", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    multiply_adds, bandwidth = limits()
    ffn = fastffn.build("neuron_tree", d_model=args.d_model, depth=args.depth, trees=args.trees)
    width, neurons = args.d_model, ffn.config.neurons
    dense = fastffn.build("dense", d_model=width, d_hidden=neurons, activation="gelu")
    compiled = torch.compile(dense)
    weights = 2 * neurons * width
    rows = []
    for tokens in args.tokens:
        x = torch.randn(tokens, width)
        gradient = torch.randn(tokens, width)
        given = (x, *(p.detach() for p in (ffn.w_in, ffn.b_in, ffn.w_out)))
        exact, scores, _ = reference.neuron_tree(*(t.double() for t in given), "gelu")
        sure = (scores[..., :-1].abs() > 1e-5).all(-1).all(0)
        with fastffn.use_backend(args.backend):
            y = neuron_tree(*given)
        gate("neuron_tree", y[sure], reference.neuron_tree(*given, "gelu")[0][sure], exact[sure], floor=1e-6)

        def forward(module: torch.nn.Module, x: torch.Tensor = x) -> None:
            with torch.no_grad(), fastffn.use_backend(args.backend):
                module(x)

        def both(module: torch.nn.Module, x: torch.Tensor = x, gradient: torch.Tensor = gradient) -> None:
            module.zero_grad()
            with fastffn.use_backend(args.backend):
                module(x.requires_grad_()).backward(gradient)
            x.grad = None

        for name, run, passes in (("forward", forward, 1), ("forward + backward", both, 3)):
            if args.forward_only and passes > 1:
                continue
            seconds = alternate(
                {
                    "dense": lambda run=run: run(dense),
                    "compiled": lambda run=run: run(compiled),
                    "tree": lambda run=run: run(ffn),
                },
                rounds=args.rounds,
                block=3,
            )
            best = min(seconds["dense"].median, seconds["compiled"].median)
            # Every visited row is read at least once (a backward pass also writes every gradient), and multiplied.
            path = args.trees * (args.depth + 1)
            visited = min(neurons, tokens * path)
            products = passes * tokens * path * 2 * width / multiply_adds
            moved = 4 * 2 * width * (visited if passes == 1 else 2 * visited + neurons) / bandwidth
            row = {
                "tokens": tokens,
                "what": name,
                "dense_ms": 1e3 * seconds["dense"].median,
                "compiled_ms": 1e3 * seconds["compiled"].median,
                "tree_ms": 1e3 * seconds["tree"].median,
                "tree_low_ms": 1e3 * seconds["tree"].low,
                "tree_high_ms": 1e3 * seconds["tree"].high,
                "ratio": best / seconds["tree"].median,
                "bound": best / max(products, moved),
                "dense_of_peak": passes * tokens * weights / multiply_adds / best,
            }
            rows.append(row)
    limit = {"multiply_adds_per_second": multiply_adds, "bytes_per_second": bandwidth}
    result = {"arguments": vars(args), "rows": rows, "limits": limit, "machine": describe_machine()}
    write_json(RESULTS / f"{args.name}.json", result)
    print(tabulate(rows, headers="keys", floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    main()
