"""How a training step's cost grows with width, layers and processes: `python benchmarks/scale.py [NAME]`.

Writes `benchmarks/results/scale/<NAME>.json` and prints the tables. Part one times a step of ordinary and factorised
models, alternating, and sets the seconds beside the FLOPs. Part two trains the same model with one process and with
two of one thread each (gloo, on this machine), twice the batch for two: whatever is lost is the price of speaking to
each other, and of sharing the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastffn.bench.step import bench_step
from fastffn.convert.files import write_json
from fastffn.convert.fresh import ModelShape
from fastffn.measure.machine import describe_machine
from fastffn.nn import LowRankConfig

RESULTS = Path(__file__).parent / "results" / "scale"
# (layers, width); the vocabulary is small, so that layers are most of the work.
SHAPES = [(4, 128), (4, 256), (4, 512), (2, 256), (8, 256)]
MODEL = ["--layers", "4", "--d-model", "256", "--heads", "4", "--sequence", "256", "--tokenizer", "train:2048"]


def shapes() -> list[dict[str, Any]]:
    """Part one."""
    rows = []
    for layers, width in SHAPES:
        shape = ModelShape(layers=layers, d_model=width, heads=4, sequence=256, vocabulary=2048)
        ffn = LowRankConfig(d_model=width, rank=width // 4, activation=shape.activation)
        found = bench_step(shape, ffn, batch=4, precision="fp32", compiled=False)
        rows.append({"layers": layers, "d_model": width, **found})
    return rows


def processes(kind: str) -> dict[str, Any]:
    """Part two for one kind: tokens a second with one process and with two."""
    speed = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "fastffn"]
            options = [*MODEL, "--ffn", kind, "--no-baseline", "--batch", str(4 * count), "--steps", "40"]
            options += ["--warmup-steps", "4", "--evaluate-every", "40", "--checkpoint-every", "40"]
            subprocess.run(
                [sys.executable, *launcher, "pretrain", *options, "--output", str(output)],
                check=True,
                stdout=subprocess.DEVNULL,
                env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
            )
            stages = json.loads((output / "results.json").read_text())["stages"]
            stage = stages.get("stage1", stages.get("dense"))
            speed[count] = stage["tokens"] / stage["own_seconds"]
    return {"kind": kind, "one": speed[1], "two": speed[2], "efficiency": speed[2] / speed[1] / 2}


def main() -> None:
    """Both parts."""
    name = sys.argv[1] if len(sys.argv) > 1 else "here"
    result = {
        "command": "python benchmarks/scale.py",
        "shapes": shapes(),
        "processes": [processes(kind) for kind in ("dense", "low_rank")],
        "machine": describe_machine(),
    }
    write_json(RESULTS / f"{name}.json", result)
    rows = [
        (
            row["layers"],
            row["d_model"],
            *(f"{row['seconds'][kind]['median']:.4f}" for kind in ("dense", "factorised")),
            *(f"{row['gflops'][kind] / row['seconds'][kind]['median']:.0f}" for kind in ("dense", "factorised")),
            f"{row['ratio']:.2f}",
            f"{row['bound']:.2f}",
        )
        for row in result["shapes"]
    ]
    headers = ("layers", "width", "dense s", "factorised s", "dense GFLOP/s", "factorised GFLOP/s", "ratio", "bound")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True), end="\n\n")
    rows = [(p["kind"], f"{p['one']:,.0f}", f"{p['two']:,.0f}", f"{p['efficiency']:.2f}") for p in result["processes"]]
    print(
        tabulate(rows, headers=("kind", "one process", "two", "efficiency"), tablefmt="github", disable_numparse=True)
    )


if __name__ == "__main__":
    main()
