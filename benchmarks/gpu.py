"""Everything about an accelerator, in one command, where there is no network: check, then measure.

    python benchmarks/gpu.py h200                # what is not done yet, part by part; begins none after nine minutes
    python benchmarks/gpu.py h200 --list
    python benchmarks/gpu.py h200 --only check-bf16 --only layer-768-11-bf16    # all parts whose names begin so
    python benchmarks/gpu.py toy --dry-run       # toy sizes, on a CPU too: whether it runs, not how fast

Parts, what is worth most first:
- `check-DTYPE`: every Triton kernel against the definition in float64. All cases run; if one fails the script ends.
  Nothing is timed in a dtype unless its check has passed, and kernels, models and profile not unless bf16's has;
- `kernels-DEPTH-D`: the designs and a dense FFN against each other, eager and as a captured graph: what the figures in
  `ops/neuron_tree/routes.py` are to be fitted to;
- `layer-D-DEPTH-DTYPE-TOKENS`: `fastffn bench layer`: dense eager and compiled, of equal active width, of a
  width that is a multiple of eight; published code; a top-1 mixture of experts; bounds; memory. tf32 is float32 whose
  products may be TF32, on all sides;
- `models-training`, `models-decoding`: of GPT-2-small shape;
- `profile`: of one row that is always the same, and of the one that is furthest from its bound.

Each part is a file in `benchmarks/results/gpu/<NAME>/`; one that is there is not done again, so a run that was ended
goes on. Results of a dry run, or of kernels whose sources have changed since, do not count. A part that fails leaves
`<PART>.error.txt`, and the others are done. Plots are drawn where matplotlib and tabulate are installed: `--plot` draws
them later, from the files. Needs torch, triton, numpy and this package.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import DTYPES, backend, check_part, draw_tree, kernel, precision
from gpu_models import decoding_part, training_part
from torch.nn import functional as F

import fastffn
from fastffn import DenseConfig, MoEConfig, NeuronTreeConfig
from fastffn.bench.layer import LayerCase, bench_layer
from fastffn.measure.machine import describe_machine
from fastffn.measure.memory import peak_bytes
from fastffn.measure.timer import Timing, accelerator, alternate, free_memory, synchronize
from fastffn.ops import OPS
from fastffn.ops.activations import ACTIVATIONS, plain_name
from fastffn.ops.neuron_tree import routes

RESULTS = Path(__file__).parent / "results" / "gpu"
# Calls in a captured graph: what starting it costs the processor is shared by them.
IN_GRAPH = 10


@dataclass
class Plan:
    """Sizes of everything, and where it runs.

    Attributes:
        check: tokens, depth, trees, D, O of trees that are checked.
        small: of one that is checked without biases and with each of `activations`.
        kernels: tokens, and (depth, D), of designs that are timed against each other.
        layers: (D, depth, dtype) of layers; tokens of each.
        profile: (D, depth, dtype, tokens) of the row that is always profiled.
        model: layers, width, heads, vocabulary, sequence, batch, depth of trees, tokens that are decoded.
        mark: what a file must say to count as a result.
    """

    device: torch.device
    check: list[tuple[int, int, int, int, int]]
    small: tuple[int, int, int, int, int]
    activations: list[str]
    kernel_tokens: list[int]
    kernels: list[tuple[int, int]]
    layers: list[tuple[int, int, str]]
    layer_tokens: tuple[int, ...]
    profile: tuple[int, int, str, int]
    model: dict[str, int]
    seconds: float
    rounds: int
    compiled: bool
    results: Path = field(default_factory=Path)
    mark: dict[str, Any] = field(default_factory=dict)


def full_plan(device: torch.device) -> Plan:
    """What a GPU is asked."""
    return Plan(
        device=device,
        check=[(1, 11, 1, 768, 768), (64, 11, 1, 768, 768), (1000, 7, 2, 100, 36), (5000, 11, 1, 768, 768),
               (5000, 8, 3, 130, 257), (3000, 14, 1, 64, 64), (777, 0, 3, 50, 50), (20000, 12, 1, 256, 256),
               (500, 11, 1, 4096, 4096)],
        small=(33, 3, 2, 24, 20),
        activations=sorted({plain_name(name): name for name in ACTIVATIONS}.values()),
        kernel_tokens=[1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 16384, 131072],
        kernels=[(11, 768), (7, 768), (11, 4096)],
        layers=[(d, depth, dtype) for dtype in ("bf16", "fp32") for d in (768, 2048, 4096) for depth in (11, 7, 9, 12)]
        + [(768, 11, "tf32")],
        layer_tokens=(1, 8, 64, 512, 1024, 4096, 16384, 131072),
        profile=(768, 11, "bf16", 16384),
        model={"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257, "sequence": 1024, "batch": 16,
               "depth": 11, "decode": 64},
        seconds=3.0,
        rounds=15,
        compiled=True,
    )  # fmt: skip


def toy_plan(device: torch.device) -> Plan:
    """The same, as small as it gets."""
    return Plan(
        device=device,
        check=[(5, 3, 1, 9, 7)],
        small=(2, 1, 1, 5, 3),
        activations=["relu"],
        kernel_tokens=[3],
        kernels=[(3, 8)],
        layers=[(8, 3, "bf16")],
        layer_tokens=(3,),
        profile=(8, 3, "bf16", 3),
        model={"layers": 1, "width": 16, "heads": 2, "vocabulary": 31, "sequence": 8, "batch": 2, "depth": 3,
               "decode": 2},
        seconds=0.05,
        rounds=1,
        compiled=False,
    )  # fmt: skip


def captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """`IN_GRAPH` calls as one graph; None where the device has none. That they can be captured is a check too."""
    if not torch.cuda.is_available():
        return None
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_GRAPH):
            run()
    return graph.replay


def kernels_part(plan: Plan, depth: int, width: int) -> dict[str, Any]:
    """Seconds of both designs and of dense FFNs, each alone and in a graph; predictions of `routes` beside them.

    The dense FFN has no biases and nothing that a compiler could fuse: two products and an activation.
    """
    rows, options = [], ("gelu", False)
    for tokens in plan.kernel_tokens:
        case = draw_tree(tokens, depth, 1, width, width, torch.bfloat16, plan.device)
        x, w_in, _, w_out = case
        ours = backend("triton")
        calls: dict[str, Callable[[], object]] = {}
        for hidden in (w_in.shape[1], w_in.shape[1] + 1):
            # Rows of 4,095 numbers are read by no fast product; a dense FFN of 4,096 is the one to beat.
            up, down = x.new_zeros(hidden, width), x.new_zeros(width, hidden)
            up[: w_in.shape[1]], down[:, : w_in.shape[1]] = w_in[0], w_out[0].T
            calls[f"dense {hidden}"] = partial(_dense, x, up, down)
            calls[f"dense {hidden} and backward"] = partial(_dense_both, x, up, down)
        for design in ("path", "levels"):
            calls[design] = partial(_forward, design, ours, case, options)
            calls[f"{design} and backward"] = partial(_both, design, ours, case, options)
        for name, call in list(calls.items()):
            graph = captured(call)
            if graph is not None:
                calls[f"{name}, graph"] = graph
        timings = alternate(calls, rounds=plan.rounds, block=10 if plan.rounds > 1 else 1)
        shape = (tokens, 1, depth + 1, 2 * width)
        predicted = {"path": routes.path_time, "levels": routes.levels_time, "dense": routes.dense_time}
        op = OPS["neuron_tree"]
        request = op.request(*case, *options)
        rows.append({
            "tokens": tokens, "depth": depth, "D": width, "chosen": routes.kernel_for(*shape),
            "backends": [op.choose(request).name, op.choose(request, backward=True).name],
            "seconds": {name: _each(timing, name) for name, timing in timings.items()},
            "predicted": {name: function(*shape) * 1e-9 for name, function in predicted.items()},
        })  # fmt: skip
        calls.clear()
        free_memory()
    return {"rows": rows}


def _each(timing: Timing, name: str) -> dict[str, float]:
    """Of one call."""
    calls = IN_GRAPH if name.endswith(", graph") else 1
    return {key: value if key == "calls" else value / calls for key, value in asdict(timing).items()}


def _dense(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.gelu(x @ up.T) @ down.T


def _dense_both(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> object:
    """As `_both`, y for the gradient of y; what autograd would call, which a graph need not capture then."""
    before = x @ up.T
    hidden = F.gelu(before)
    y = hidden @ down.T
    d_before = torch.ops.aten.gelu_backward(y @ down, before)
    return d_before @ up, d_before.T @ x, y.T @ hidden


def _forward(design: str, impl: Any, case: tuple[torch.Tensor, ...], options: tuple[Any, ...]) -> object:
    with kernel(design):
        return impl.forward(*case, *options, keep=False, out=None)


def _both(design: str, impl: Any, case: tuple[torch.Tensor, ...], options: tuple[Any, ...]) -> object:
    with kernel(design):
        y, *saved = impl.forward(*case, *options, keep=True, out=None)
        return impl.backward(y, *case, *options, *saved, needs=(True,) * 4)


def layer_part(plan: Plan, width: int, depth: int, dtype: str, tokens: int) -> dict[str, Any]:
    """`bench layer` of a tree, and of top-1 experts that are as wide in all and active as its subtrees are."""
    common = {"tokens": (tokens,), "dtype": "fp32" if dtype == "tf32" else dtype, "device": str(plan.device),
              "compiled": plan.compiled, "max_seconds": plan.seconds, "rounds": plan.rounds}  # fmt: skip
    experts = 2 ** ((depth + 1) // 2)
    moe = MoEConfig(d_model=width, experts=experts, expert_width=2 ** (depth + 1) // experts, active=1)
    tree, dense = NeuronTreeConfig(d_model=width, depth=depth), DenseConfig(d_model=width, d_hidden=2 ** (depth + 1))
    with precision(dtype):
        result: dict[str, Any] = {
            "tree": bench_layer(LayerCase(config=tree.resolved(), **common), print),
            "moe": bench_layer(LayerCase(config=moe.resolved(), **common), print),
            "memory": {},
        }
        for name, config in (("neuron_tree", tree), ("dense", dense)):
            free_memory()
            ffn = fastffn.build(config).to(plan.device, DTYPES[dtype])
            x = torch.randn(tokens, width, device=plan.device, dtype=DTYPES[dtype], requires_grad=True)
            try:
                result["memory"][name] = peak_bytes(lambda f=ffn, x=x: f(x).sum().backward(), plan.device)
            except torch.OutOfMemoryError:
                result["memory"][name] = None
    return result


def profile_part(plan: Plan) -> dict[str, Any]:
    """Where the time goes in a row that is always the same, and in the tree's that is furthest from its bound."""
    worst: tuple[float, Any] = (0.0, None)
    for width, depth, dtype in plan.layers:
        for tokens in plan.layer_tokens:
            path = plan.results / f"layer-{width}-{depth}-{dtype}-{tokens}.json"
            if not done(path, plan.mark):
                continue
            for row in json.loads(path.read_text(encoding="utf-8"))["tree"]["rows"]:
                gap = row["bound"] / row["ratio"] if row["role"] == "ffn" and "bound" in row else 0.0
                worst = max(worst, (gap, (width, depth, dtype, tokens, row["passes"])), key=lambda one: one[0])
    profiles = [profile(plan, *plan.profile, passes) for passes in ("forward", "forward + backward")]
    if worst[1] is not None:
        profiles.append({"gap": worst[0]} | profile(plan, *worst[1]))
    return {"profiles": profiles}


def profile(plan: Plan, width: int, depth: int, dtype: str, tokens: int, passes: str) -> dict[str, Any]:
    """The longest of what ran on the device, and on the host."""
    ffn = fastffn.build(NeuronTreeConfig(d_model=width, depth=depth)).to(plan.device, DTYPES[dtype])
    x = torch.randn(tokens, width, device=plan.device, dtype=DTYPES[dtype])

    def run() -> None:
        if passes == "forward":
            with torch.no_grad():
                ffn(x)
        else:
            ffn(x).sum().backward()
            ffn.zero_grad(set_to_none=True)

    with precision(dtype):
        for _ in range(3):
            run()
        with torch.profiler.profile() as profiler:
            for _ in range(10):
                run()
            synchronize()
    events = profiler.key_averages()
    of_device = [(event.key, event.count, getattr(event, "self_device_time_total", 0)) for event in events]
    of_host = [(event.key, event.count, event.self_cpu_time_total) for event in events]
    return {
        "layer": [width, depth, dtype], "tokens": tokens, "passes": passes, "calls": 10,
        "microseconds_of_device": sorted(of_device, key=lambda one: -one[2])[:20],
        "microseconds_of_host": sorted(of_host, key=lambda one: -one[2])[:20],
    }  # fmt: skip


def parts_of(plan: Plan) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every part by name, in order."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {"check-bf16": partial(check_part, plan, "bf16")}
    for depth, width in plan.kernels:
        parts[f"kernels-{depth}-{width}"] = partial(kernels_part, plan, depth, width)

    def add(layers: list[tuple[int, int, str]]) -> None:
        for width, depth, dtype in layers:
            parts.setdefault(f"check-{dtype}", partial(check_part, plan, dtype))
            for tokens in plan.layer_tokens:
                name = f"layer-{width}-{depth}-{dtype}-{tokens}"
                parts.setdefault(name, partial(layer_part, plan, width, depth, dtype, tokens))

    first = plan.layers[0][:2]
    add(plan.layers[:1])
    parts["models-training"], parts["models-decoding"] = partial(training_part, plan), partial(decoding_part, plan)
    parts["profile"] = partial(profile_part, plan)
    add([layer for layer in plan.layers if layer[:2] == first])
    add(plan.layers)
    if plan.compiled:
        parts["check-fp16"] = partial(check_part, plan, "fp16")
    return parts


def check_of(name: str) -> str:
    """The part that must have passed before this one is timed."""
    return f"check-{name.split('-')[3] if name.startswith('layer-') else 'bf16'}"


def kernels_hash() -> str:
    """Of the sources of all Triton kernels."""
    digest = hashlib.sha256()
    for path in sorted((Path(fastffn.__file__).parent / "ops").rglob("*triton*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def done(path: Path, mark: dict[str, Any]) -> bool:
    """Whether there is a result, of this kind of run and of these kernels, and nothing in it failed."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return not found.get("failures") and all(found.get(key) == value for key, value in mark.items())


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial_path.rename(path)


def plot(folder: Path) -> None:
    """One PNG for each layer that was measured."""
    missing = [name for name in ("matplotlib", "tabulate") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"no plots: {', '.join(missing)} not installed; --plot draws them later from {folder}")
        return
    from fastffn.bench.layer.report import plot_layer

    layers: dict[str, dict[int, Any]] = {}
    for path in folder.glob("layer-*.json"):
        name, _, tokens = path.stem.rpartition("-")
        layers.setdefault(name, {})[int(tokens)] = json.loads(path.read_text(encoding="utf-8"))["tree"]
    for name, found in layers.items():
        rows = [row for tokens in sorted(found) for row in found[tokens]["rows"]]
        plot_layer(found[min(found)] | {"rows": rows}, folder / f"{name}.png")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="which machine it is: a folder of results")
    parser.add_argument("--only", action="append", metavar="PART", help="parts whose names begin so, done or not")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part is begun after so many")
    parser.add_argument("--list", action="store_true", help="parts, and which are done")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, without an accelerator too")
    parser.add_argument("--plot", action="store_true", help="draw plots from results, measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that holds results of all machines")
    args, begin = parser.parse_args(), time.perf_counter()
    device = accelerator()
    if device is None and not args.dry_run and not (args.list or args.plot):
        parser.error("there is no accelerator; --dry-run runs toy sizes on the CPU")
    if device is None and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton, which torch has imported by now, looks at it then.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    plan = (toy_plan if args.dry_run else full_plan)(device or torch.device("cpu"))
    plan.results = args.results / args.name
    plan.mark = {"dry_run": args.dry_run, "kernels": kernels_hash()}
    parts = parts_of(plan)
    for only in args.only or ():
        if not any(_asked(name, only) for name in parts):
            parser.error(f"there is no part '{only}'; there are {', '.join(parts)}")
    if args.plot:
        plot(plan.results)
        return
    if args.list:
        for name in parts:
            print(f"{name:28} {'done' if done(plan.results / f'{name}.json', plan.mark) else ''}")
        return
    failed = []
    for name, run in parts.items():
        if args.only and not any(_asked(name, only) for only in args.only):
            continue
        if not args.only and done(plan.results / f"{name}.json", plan.mark):
            continue
        if time.perf_counter() - begin >= 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over before {name}; run it again to go on", flush=True)
            break
        if not name.startswith("check-") and not done(plan.results / f"{check_of(name)}.json", plan.mark):
            print(f"{name}: not timed, {check_of(name)} has not passed", flush=True)
            failed.append(name)
        elif not run_part(plan, name, run):
            failed.append(name)
            if name.startswith("check-"):
                break
    plot(plan.results)
    if failed:
        sys.exit(f"failed or not timed: {', '.join(failed)}")


def _asked(name: str, only: str) -> bool:
    return name == only or name.startswith(f"{only}-")


def run_part(plan: Plan, name: str, run: Callable[[], dict[str, Any]]) -> bool:
    """Writes its result, or its error; whether it went well."""
    path, start = plan.results / f"{name}.json", time.perf_counter()
    error_path = path.with_suffix(".error.txt")
    error_path.unlink(missing_ok=True)
    try:
        result = run()
    except Exception:
        path.parent.mkdir(parents=True, exist_ok=True)
        error_path.write_text(traceback.format_exc(), encoding="utf-8")
        print(f"{name}: {traceback.format_exc()}", flush=True)
        result = None
    # Raises where the device itself has failed, and nothing that came after would be worth anything.
    synchronize()
    free_memory()
    if result is None:
        return False
    seconds = time.perf_counter() - start
    write(path, {"part": name, **plan.mark, "seconds": seconds, "machine": describe_machine(), **result})
    print(f"{name}: {seconds:.0f} s", flush=True)
    for failure in result.get("failures", ()):
        print(f"{name} failed: {failure}", flush=True)
    return not result.get("failures")


if __name__ == "__main__":
    main()
