"""Everything about an accelerator, in one command, where there is no network: check, then measure.

    python benchmarks/gpu.py h200                # what is not done yet, part by part; each takes less than ten minutes
    python benchmarks/gpu.py h200 --list
    python benchmarks/gpu.py h200 --only check --only layer-768-11-bf16
    python benchmarks/gpu.py toy --dry-run       # toy sizes, on a CPU too: whether it runs, not how fast

Parts, in order:
- `check`: every Triton kernel against the definition in float64; nothing is timed unless it passes;
- `kernels`: the designs against each other and dense, eager and as a captured graph: what the figures in
  `ops/neuron_tree/routes.py` are to be fitted to;
- `layer-D-DEPTH-DTYPE`: `fastffn bench layer`: dense eager and compiled, of equal active width, published code, a top-1
  mixture of experts; bounds; memory;
- `models`: a training step and greedy decoding of GPT-2-small shape;
- `profile`: of the row that is furthest from its bound.

Each part is a file in `benchmarks/results/gpu/<NAME>/`; one that is there is not done again, so a run that was ended
goes on. Plots are drawn where matplotlib and tabulate are installed: `--plot` draws them later, from the files. Needs
torch, triton, numpy and this package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fastffn
from fastffn import DenseConfig, LowRankConfig, MoEConfig, NeuronTreeConfig
from fastffn.bench.layer import LayerCase, bench_layer
from fastffn.measure.gate import gate
from fastffn.measure.machine import describe_machine
from fastffn.measure.memory import peak_bytes
from fastffn.measure.timer import accelerator, alternate, synchronize
from fastffn.ops import OPS
from fastffn.ops.neuron_tree import reference, routes
from fastffn.ops.neuron_tree import triton as tree_kernels

RESULTS = Path(__file__).parent / "results" / "gpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Plan:
    """Sizes of everything, and where it runs.

    Attributes:
        check: tokens, depth, trees, D, O of trees that are checked.
        kernels: tokens, and (depth, D), of designs that are timed against each other.
        layers: (D, depth, dtype) of layers; tokens of each.
        model: layers, width, heads, vocabulary, sequence, batch, depth of trees, tokens that are decoded.
    """

    device: torch.device
    check: list[tuple[int, int, int, int, int]]
    check_dtypes: list[str]
    kernel_tokens: list[int]
    kernels: list[tuple[int, int]]
    layers: list[tuple[int, int, str]]
    layer_tokens: tuple[int, ...]
    model: dict[str, int]
    seconds: float
    rounds: int
    compiled: bool
    results: Path = field(default_factory=Path)


def full_plan(device: torch.device) -> Plan:
    """What a GPU is asked."""
    return Plan(
        device=device,
        check=[(1, 11, 1, 768, 768), (64, 11, 1, 768, 768), (1000, 7, 2, 100, 36), (5000, 11, 1, 768, 768),
               (5000, 8, 3, 130, 257), (3000, 14, 1, 64, 64), (777, 0, 3, 50, 50), (20000, 12, 1, 256, 256)],
        check_dtypes=["fp32", "bf16", "fp16"],
        kernel_tokens=[1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 16384, 131072],
        kernels=[(11, 768), (7, 768), (11, 4096)],
        layers=[(d, depth, dtype) for d in (768, 2048, 4096) for depth in (7, 9, 11, 12) for dtype in ("bf16", "fp32")],
        layer_tokens=(1, 8, 64, 512, 1024, 4096, 16384, 131072),
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
        check_dtypes=["fp32"],
        kernel_tokens=[3],
        kernels=[(3, 8)],
        layers=[(8, 3, "fp32")],
        layer_tokens=(3,),
        model={"layers": 1, "width": 16, "heads": 2, "vocabulary": 31, "sequence": 8, "batch": 2, "depth": 3,
               "decode": 2},
        seconds=0.05,
        rounds=1,
        compiled=False,
    )  # fmt: skip


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """One of the designs for trees, whatever the table says."""
    before = tree_kernels.kernel_for
    tree_kernels.kernel_for = lambda tokens, trees, levels, width: name if 2 <= levels <= 14 else "path"
    try:
        yield
    finally:
        tree_kernels.kernel_for = before


def draw_tree(
    tokens: int, depth: int, trees: int, d_model: int, d_out: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """x, w_in, b_in, w_out."""
    random = torch.Generator().manual_seed(tokens + depth)
    nodes = 2 ** (depth + 1) - 1
    x = torch.randn(tokens, d_model, generator=random)
    w_in = torch.randn(trees, nodes, d_model, generator=random) / d_model**0.5
    b_in = 0.3 * torch.randn(trees, nodes, generator=random)
    w_out = torch.randn(trees, nodes, d_out, generator=random) / ((depth + 1) * trees) ** 0.5
    return tuple(tensor.to(device, dtype) for tensor in (x, w_in, b_in, w_out))


def backend(name: str) -> Any:
    """The tree's implementation of that name."""
    return next(impl for impl in OPS["neuron_tree"].impls if impl.name == name)


def check_part(plan: Plan) -> dict[str, Any]:
    """Outputs, paths and gradients of both designs and of grouped products against float64, on the CPU."""
    rows = []
    for tokens, depth, trees, d_model, d_out in plan.check:
        for dtype in plan.check_dtypes:
            for activation, straight in (("gelu", False), ("silu", True)):
                case = draw_tree(tokens, depth, trees, d_model, d_out, DTYPES[dtype], plan.device)
                for design in ("path", "levels"):
                    with kernel(design):
                        row = check_tree(case, activation, straight)
                    rows.append({"tokens": tokens, "trees": f"{trees}x{depth}", "D": d_model, "dtype": dtype,
                                 "activation": activation, "design": design, **row})  # fmt: skip
    for tokens, mlps, width in ((1, 4, 32), (700, 5, 60), (5000, 16, 256))[: 1 if len(plan.check) == 1 else 3]:
        for dtype in plan.check_dtypes:
            for gated in (False, True):
                row = check_grouped(tokens, mlps, width, gated, DTYPES[dtype], plan.device)
                rows.append({"tokens": tokens, "mlps": mlps, "width": width, "gated": gated, "dtype": dtype, **row})
    return {"rows": rows}


def check_tree(case: tuple[torch.Tensor, ...], activation: str, straight: bool) -> dict[str, float]:
    """Relative errors; raises where one is more than rounding, where bits change, or a clear decision differs."""
    ours, options = backend("triton"), (activation, straight)
    dtype = case[0].dtype
    eps = torch.finfo(dtype).eps
    exact = [tensor.cpu().double() for tensor in case]
    right_y, right_scores, right_last = reference.neuron_tree(*exact, *options)
    y, scores, last = ours.forward(*case, *options, keep=True, out=None)
    margin = 8 * eps * max(1.0, float(right_scores.abs().max()))
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        margin = 2**-9  # TF32
    sure = (right_scores.abs() > margin).all(-1)
    if not torch.equal(last.cpu()[sure], right_last[sure]):
        raise fastffn.errors.MeasurementError("a clear decision went the other way")
    whole = sure.all(0)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradient[~whole] = 0  # a token whose path is not sure gets no gradient, and so gives none
    found = ours.backward(gradient.to(y.device), *case, *options, scores, last, needs=(True,) * 4)
    again = ours.backward(gradient.to(y.device), *case, *options, scores, last, needs=(True,) * 4)
    if not all(torch.equal(one, two) for one, two in zip(found, again, strict=True)):
        raise fastffn.errors.MeasurementError("gradients have other bits in a second run")
    wanted = reference.backward(gradient.double(), *exact, *options, right_scores, right_last, needs=(True,) * 4)
    # Sums over all tokens, of terms that are rounded: errors add up like a random walk.
    floor = (32 if dtype == torch.float32 else 4) * eps * max(1.0, len(y) ** 0.5 / 8)
    if not whole.any():
        return {"tokens compared": 0}
    errors = {"y": gate("y", y.cpu()[whole], right_y[whole].to(dtype), right_y[whole], floor=floor)}
    for name, one, right in zip(("x", "w_in", "b_in", "w_out"), found, wanted, strict=True):
        errors[name] = gate(f"gradient of {name}", one.cpu(), right.to(dtype), right, floor=floor)
    return errors | {"tokens compared": int(whole.sum())}


def check_grouped(
    tokens: int, mlps: int, width: int, gated: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Relative errors of grouped products and their gradients."""
    from fastffn.ops.grouped_mlp.reference import definition

    random = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 48), (mlps, width, 48), (mlps, width), (mlps, 40, width), (mlps, 40))
    shapes += ((mlps, width, 48), (mlps, width)) if gated else ()
    drawn = [(torch.randn(s, generator=random) / max(1, s[-1]) ** 0.5).to(dtype) for s in shapes]
    index = torch.randint(mlps, (tokens,), generator=random)

    def run(tensors: list[torch.Tensor], where: torch.device, function: Callable[..., torch.Tensor]) -> list[Any]:
        leaves = [t.to(where).requires_grad_() for t in tensors]
        y = function(leaves[0], index.to(where), *leaves[1:])
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    def of_definition(x: torch.Tensor, i: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return definition(x, i, *rest, *(() if gated else (None, None)), "gelu")

    with fastffn.use_backend("triton"):
        ours = run(drawn, device, fastffn.ops.grouped_mlp)
    same = run(drawn, torch.device("cpu"), of_definition)
    exact = run([t.double() for t in drawn], torch.device("cpu"), of_definition)
    names = ["y", "x", "up", "up bias", "down", "down bias", "gate", "gate bias"]
    floor = 32 * torch.finfo(dtype).eps
    return {
        name: gate(name, one.cpu(), other, right, floor=floor)
        for name, one, other, right in zip(names, ours, same, exact, strict=False)
    }


def captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a graph, started at once; None where the device has none. That it can be captured is a check too."""
    if not hasattr(torch, "cuda") or not torch.cuda.is_available():
        return None
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kernels_part(plan: Plan) -> dict[str, Any]:
    """Seconds of both designs and of the two products of a dense FFN; predictions of `routes` beside them."""
    rows = []
    for depth, width in plan.kernels:
        for tokens in plan.kernel_tokens:
            case = draw_tree(tokens, depth, 1, width, width, torch.bfloat16, plan.device)
            options = ("gelu", False)
            x, w_in, _, w_out = case
            up, down = w_in[0], w_out[0].T.contiguous()
            ours = backend("triton")
            calls: dict[str, Callable[[], object]] = {"dense": lambda u=up, d=down, x=x: F.gelu(x @ u.T) @ d.T}
            for design in ("path", "levels"):
                calls[design] = partial(_forward, design, ours, case, options)
                calls[f"{design} and backward"] = partial(_both, design, ours, case, options)
            for name, call in list(calls.items()):
                graph = captured(call)
                if graph is not None:
                    calls[f"{name}, graph"] = graph
            timings = alternate(calls, rounds=max(1, plan.rounds), block=10 if plan.rounds > 1 else 1)
            shape = (tokens, 1, depth + 1, 2 * width)
            predicted = {"path": routes.path_time, "levels": routes.levels_time, "dense": routes.dense_time}
            rows.append({
                "tokens": tokens, "depth": depth, "D": width, "chosen": routes.kernel_for(*shape),
                "seconds": {name: asdict(timing) for name, timing in timings.items()},
                "predicted": {name: function(*shape) * 1e-9 for name, function in predicted.items()},
            })  # fmt: skip
    return {"rows": rows}


def _forward(design: str, impl: Any, case: tuple[torch.Tensor, ...], options: tuple[Any, ...]) -> object:
    with kernel(design):
        return impl.forward(*case, *options, keep=False, out=None)


def _both(design: str, impl: Any, case: tuple[torch.Tensor, ...], options: tuple[Any, ...]) -> object:
    with kernel(design):
        y, *saved = impl.forward(*case, *options, keep=True, out=None)
        return impl.backward(y, *case, *options, *saved, needs=(True,) * 4)


def layer_part(plan: Plan, width: int, depth: int, dtype: str) -> dict[str, Any]:
    """`bench layer` of a tree, and of top-1 experts that are as wide in all and active as its subtrees are."""
    common = {"tokens": plan.layer_tokens, "dtype": dtype, "device": str(plan.device), "compiled": plan.compiled,
              "max_seconds": plan.seconds, "rounds": plan.rounds}  # fmt: skip
    experts = 2 ** ((depth + 1) // 2)
    moe = MoEConfig(d_model=width, experts=experts, expert_width=2 ** (depth + 1) // experts, active=1)
    result = {
        "tree": bench_layer(LayerCase(config=NeuronTreeConfig(d_model=width, depth=depth).resolved(), **common), print),
        "moe": bench_layer(LayerCase(config=moe.resolved(), **common), print),
        "memory": {},
    }
    for name, config in (("neuron_tree", NeuronTreeConfig(d_model=width, depth=depth)),
                         ("dense", DenseConfig(d_model=width, d_hidden=2 ** (depth + 1)))):  # fmt: skip
        ffn = fastffn.build(config).to(plan.device, DTYPES[dtype])
        for tokens in plan.layer_tokens:
            x = torch.randn(tokens, width, device=plan.device, dtype=DTYPES[dtype], requires_grad=True)
            result["memory"][f"{name}, {tokens}"] = peak_bytes(lambda f=ffn, x=x: f(x).sum().backward(), plan.device)
            ffn.zero_grad(set_to_none=True)
    return result


class Block(nn.Module):
    """Attention and an FFN, each after a norm."""

    def __init__(self, width: int, heads: int, config: Any) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = fastffn.build(config)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, Any]:
        """`[B, S, D]`, and keys and values `[B, heads, *, D / heads]` of what came before."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split(width, -1)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.ffn(self.norms[1](x)), (k, v)


class Model(nn.Module):
    """GPT-2's shape, without transformers: embeddings, blocks, a norm, tied output."""

    def __init__(self, sizes: dict[str, int], config: Any) -> None:
        super().__init__()
        width = sizes["width"]
        self.tokens = nn.Embedding(sizes["vocabulary"], width)
        self.places = nn.Embedding(sizes["sequence"], width)
        self.blocks = nn.ModuleList([Block(width, sizes["heads"], config) for _ in range(sizes["layers"])])
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, ids: torch.Tensor, past: list[Any] | None = None) -> tuple[torch.Tensor, list[Any]]:
        """Logits `[B, S, vocabulary]`, and keys and values."""
        begin = 0 if past is None else past[0][0].shape[2]
        x = self.tokens(ids) + self.places(torch.arange(begin, begin + ids.shape[1], device=ids.device))
        kept = []
        for number, block in enumerate(self.blocks):
            x, one = block(x, None if past is None else past[number])
            kept.append(one)
        return self.norm(x) @ self.tokens.weight.T, kept


def models_part(plan: Plan) -> dict[str, Any]:
    """A training step and greedy decoding with each kind of FFN, beside a model whose FFNs cost nothing."""
    sizes, width = plan.model, plan.model["width"]
    kinds: dict[str, Any] = {
        "dense": DenseConfig(d_model=width),
        "low_rank": LowRankConfig(d_model=width, d_hidden=4 * width, rank=width // 4),
        "neuron_tree": NeuronTreeConfig(d_model=width, depth=sizes["depth"]),
        "moe": MoEConfig(d_model=width, experts=8, expert_width=width // 2, active=1),
    }
    steps: dict[str, Callable[[], object]] = {}
    decodes: dict[str, Callable[[], object]] = {}
    ids = torch.randint(sizes["vocabulary"], (sizes["batch"], sizes["sequence"]), device=plan.device)
    for name, config in {**kinds, "no FFN": DenseConfig(d_model=width, d_hidden=1)}.items():
        torch.manual_seed(0)
        model = Model(sizes, config).to(plan.device)
        if name == "no FFN":
            for block in model.blocks:
                block.ffn = nn.Identity()
        steps[name] = partial(train_step, model, torch.optim.AdamW(model.parameters(), lr=1e-4), ids)
        decodes[name] = partial(decode, model, ids[:1, : sizes["sequence"] // 2], sizes["decode"])
    result: dict[str, Any] = {"sizes": sizes}
    for part, calls in (("training step", steps), ("decoding", decodes)):
        timings = alternate(calls, rounds=plan.rounds, warmup=1 if plan.rounds == 1 else 3)
        dense = timings["dense"].median
        result[part] = {
            "seconds": {name: asdict(timing) for name, timing in timings.items()},
            "ratio": {name: dense / timing.median for name, timing in timings.items()},
        }
    return result


def train_step(model: Model, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """In bfloat16 by autocast."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, _ = model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss = loss + fastffn.auxiliary_loss(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def decode(model: Model, prompt: torch.Tensor, number: int) -> torch.Tensor:
    """The likeliest token each time."""
    model.eval()
    with torch.autocast(prompt.device.type, torch.bfloat16):
        logits, past = model(prompt)
        found = [logits[:, -1:].argmax(-1)]
        while len(found) < number:
            logits, past = model(found[-1], past)
            found.append(logits[:, -1:].argmax(-1))
    model.train()
    return torch.cat(found, 1)


def profile_part(plan: Plan) -> dict[str, Any]:
    """Where the time goes in the row of a tree that is furthest from its bound."""
    worst: tuple[float, Any, Any] | None = None
    for width, depth, dtype in plan.layers:
        path = plan.results / f"layer-{width}-{depth}-{dtype}.json"
        if not path.exists():
            continue
        for row in json.loads(path.read_text(encoding="utf-8"))["tree"]["rows"]:
            gap = row["bound"] / row["ratio"] if row["role"] == "ffn" else 0.0
            if worst is None or gap > worst[0]:
                worst = (gap, (width, depth, dtype), row)
    if worst is None:
        return {"left_out": "no layer was measured"}
    gap, (width, depth, dtype), row = worst
    ffn = fastffn.build(NeuronTreeConfig(d_model=width, depth=depth)).to(plan.device, DTYPES[dtype])
    x = torch.randn(row["tokens"], width, device=plan.device, dtype=DTYPES[dtype])

    def run() -> None:
        if row["passes"] == "forward":
            with torch.no_grad():
                ffn(x)
        else:
            ffn(x).sum().backward()
            ffn.zero_grad(set_to_none=True)

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
        "gap": gap, "layer": [width, depth, dtype], "row": row, "calls": 10,
        "microseconds_of_device": sorted(of_device, key=lambda one: -one[2])[:20],
        "microseconds_of_host": sorted(of_host, key=lambda one: -one[2])[:20],
    }  # fmt: skip


def parts_of(plan: Plan) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every part by name, in order."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "check": lambda: check_part(plan), "kernels": lambda: kernels_part(plan),
    }  # fmt: skip
    for width, depth, dtype in plan.layers:
        parts[f"layer-{width}-{depth}-{dtype}"] = partial(layer_part, plan, width, depth, dtype)
    return parts | {"models": lambda: models_part(plan), "profile": lambda: profile_part(plan)}


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

    for path in sorted(folder.glob("layer-*.json")):
        plot_layer(json.loads(path.read_text(encoding="utf-8"))["tree"], path.with_suffix(".png"))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="which machine it is: a folder of results")
    parser.add_argument("--only", action="append", metavar="PART", help="this part, even if it is there")
    parser.add_argument("--list", action="store_true", help="parts, and which are done")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, without an accelerator too")
    parser.add_argument("--plot", action="store_true", help="draw plots from results, measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that holds results of all machines")
    args = parser.parse_args()
    device = accelerator()
    if device is None and not args.dry_run and not (args.list or args.plot):
        parser.error("there is no accelerator; --dry-run runs toy sizes on the CPU")
    if device is None and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton, which torch has imported by now, looks at it then.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    plan = (toy_plan if args.dry_run else full_plan)(device or torch.device("cpu"))
    plan.results = args.results / args.name
    parts = parts_of(plan)
    for name in args.only or ():
        if name not in parts:
            parser.error(f"there is no part '{name}'; there are {', '.join(parts)}")
    if args.plot:
        plot(plan.results)
        return
    if args.list:
        for name in parts:
            print(f"{name:24} {'done' if (plan.results / f'{name}.json').exists() else ''}")
        return
    for name, run in parts.items():
        path = plan.results / f"{name}.json"
        if (path.exists() and not args.only) or (args.only and name not in args.only):
            continue
        if name != "check" and not (plan.results / "check.json").exists():
            parser.error("kernels are checked before anything is timed: run the part 'check' first")
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        write(
            path, {"part": name, "dry_run": args.dry_run, "seconds": seconds, "machine": describe_machine(), **result}
        )
        print(f"{name}: {seconds:.0f} s", flush=True)
    plot(plan.results)


if __name__ == "__main__":
    main()
