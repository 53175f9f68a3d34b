"""The compiled kernels of `grouped_mlp` on this machine: against plain torch operators, against one dense FFN of the
width of an MLP (for as many tokens: what routing costs), and against their bounds.

    python benchmarks/grouped_mlp.py epyc-2cores --threads 1

Writes `benchmarks/results/grouped_mlp/<NAME>.json` and prints a table. The gate comes first: what is not right is not
timed. Every call has another routing; weights of all MLPs are drawn, none is zero.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional as F

from fastffn.convert.files import write_json
from fastffn.measure.gate import gate
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.ops.grouped_mlp import reference, torch_grouped
from fastffn.ops.grouped_mlp.cpu import IMPL

RESULTS = Path(__file__).parent / "results" / "grouped_mlp"
# Tokens, MLPs, width of each; D = O = 768.
SHAPES = [
    (1, 16, 256), (4, 16, 256), (16, 16, 256), (64, 16, 256), (512, 16, 256), (4096, 16, 256),
    (1, 128, 8), (16, 128, 8), (64, 128, 8), (512, 128, 8), (4096, 128, 8), (4096, 16, 8), (16, 128, 32), (1, 8, 3072),
    (8, 1, 3072), (32, 1, 3072), (512, 8, 512), (1024, 16, 256), (2048, 16, 64),
]  # fmt: skip
ROUTINGS = 8


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(tokens: int, mlps: int, width: int, args: argparse.Namespace, read: float) -> dict:
    """One row of the table."""
    dtype, d = getattr(torch, args.dtype), args.d_model
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, d), (mlps, width, d), (mlps, width), (mlps, d, width), (mlps, d))
    x, up, up_bias, down, down_bias = ((torch.randn(s, generator=g) / s[-1] ** 0.5).to(dtype) for s in shapes)
    routings = [torch.randint(mlps, (tokens,), generator=g) for _ in range(ROUTINGS)]
    rest = (up, up_bias, down, down_bias, None, None, "gelu")
    weights = (t.double() for t in (up, up_bias, down, down_bias))
    exact = reference.definition(x.double(), routings[0], *weights, None, None, "gelu")
    same = reference.definition(x, routings[0], *rest)
    ours = IMPL.forward(x, routings[0], *rest, keep=False, out=None)[0]
    gate("y", ours, same, exact, floor=8 * torch.finfo(dtype).eps)
    number = 0

    def runs_of(forward: Callable, backward: Callable) -> Callable[[], object]:
        def run() -> object:
            nonlocal number
            number += 1
            index = routings[number % ROUTINGS]
            y, *saved = forward(x, index, *rest, keep=args.backward, out=None)
            if not args.backward:
                return y
            needs = (True, False, True, True, True, True, False, False)
            return backward(y, x, index, *rest, *saved, needs=needs)

        return run

    leaves = [t.detach().clone().requires_grad_(args.backward) for t in (x, up[0], up_bias[0], down[0], down_bias[0])]

    def dense() -> object:
        y = F.linear(F.gelu(F.linear(leaves[0], leaves[1], leaves[2])), leaves[3], leaves[4])
        return torch.autograd.grad(y, leaves, y.detach()) if args.backward else y

    calls = {"cpu": runs_of(IMPL.forward, IMPL.backward), "dense": dense}
    calls["torch_grouped"] = runs_of(torch_grouped.IMPL.forward, torch_grouped.IMPL.backward)
    once = sum(seconds(run) + seconds(run) for run in calls.values())
    timings = alternate(calls, rounds=max(5, int(args.seconds / once / 2)), block=4)
    times = {name: timing.median for name, timing in timings.items()}
    visited = statistics.mean(len(set(index.tolist())) for index in routings)
    passes = 3 if args.backward else 1
    # Read once for each pass; gradients of all MLPs are written too.
    moved = (visited * (2 if args.backward else 1) + (mlps if args.backward else 0)) * 2 * width * d * x.element_size()
    moved += passes * 2 * x.nbytes
    bound = max(moved / read, passes * 2 * tokens * width * d / (args.gmacs * 1e9)) / args.threads
    return {
        "tokens": tokens, "mlps": mlps, "width": width, **times,
        "bound": bound, "bytes": moved, "multiply_adds": passes * 2 * tokens * width * d,
    }  # fmt: skip


def main() -> None:
    """Gate, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="here", help="which machine it was")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument(
        "--gmacs", type=float, default=115.0, help="multiply-adds a second of one core's registers, 1e9"
    )
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape")
    args = parser.parse_args()
    torch.set_num_threads(1)
    long = torch.randn(2**26)
    read = long.nbytes / min(seconds(long.sum) for _ in range(5))
    torch.set_num_threads(args.threads)
    rows = [measure(*shape, args, read) for shape in SHAPES]
    headers = ["tokens", "MLPs", "width", "cpu, us", "bound, us", "torch_grouped, us", "times as fast"]
    headers += ["one dense FFN, us", "times its speed"]
    table = [
        [r["tokens"], r["mlps"], r["width"], r["cpu"] * 1e6, r["bound"] * 1e6, r["torch_grouped"] * 1e6,
         r["torch_grouped"] / r["cpu"], r["dense"] * 1e6, r["dense"] / r["cpu"]]
        for r in rows
    ]  # fmt: skip
    print(tabulate(table, headers, floatfmt=".3g", tablefmt="github"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != "name"}
    write_json(RESULTS / f"{args.name}.json", {"machine": describe_machine(), "read": read, **settings, "rows": rows})


if __name__ == "__main__":
    main()
