"""Two-stage training on an accelerator, in one command, where there is no network: steps first, then time to loss.

    python benchmarks/gpu_two_stage.py h200 --data corpus --validation valid.txt.xz --tokenizer gpt2-tokenizer
    python benchmarks/gpu_two_stage.py toy --data text.txt --dry-run     # toy sizes, on a CPU too

Parts, in order, for the shapes of the presets `seed` (6 x 768) and `gpt2-small` (12 x 768), sequence 1,024, bfloat16:
- `step-SHAPE-FFN-eager` and `-compiled`: a training step, dense against another FFN, beside what arithmetic allows:
  how much faster stage 1 is at each rank, narrow and block-diagonal FFNs too;
- `time-to-loss-SHAPE-eager` and `-compiled`: `fastffn experiment time-to-loss` over 960 steps of 16 sequences, 16
  million tokens (smaller models up to 20, which are as many FLOPs).

Call it until it says that everything is done: a call ends by itself after `--minutes` (9), and the next one goes on.
Results are `benchmarks/results/gpu-two-stage/<NAME>/*.json`. Runs lie in `--runs`; of these the folders `cells` and
`tokenizer` and the file `experiment.json` of each experiment, which are small, are all that another machine needs to go
on. WikiText-2, on which confirmed models are scored, comes from the folder that FASTFFN_DATA_DIR names; without it no
paired seeds are trained. `--data` may hold any text of 20 million tokens: some 100 MB, 25 MB packed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastffn import BlockConfig, LowRankConfig, NarrowConfig
from fastffn.bench.step import bench_step, format_step
from fastffn.convert.files import read_json, write_json
from fastffn.nn import FFNConfig
from fastffn.train.config import PretrainConfig, get_preset

RESULTS = Path(__file__).parent / "results" / "gpu-two-stage"
SHAPES = ("seed", "gpt2-small")
RECIPES = ("dense-ffn-2x", "dense-upper-8th", "half-stays-2x", "naive", "narrow-2x-70-2x", "first-dense-16th-80")
VOCABULARY = 50257


def ffns(width: int) -> dict[str, FFNConfig]:
    """FFNs of stage 1 by name."""
    ranks = {8, width // 8, width // 4, width // 2}
    return {f"rank-{rank}": LowRankConfig(rank=rank) for rank in sorted(ranks)} | {
        f"narrow-{width}": NarrowConfig(width=width),
        "block-4": BlockConfig(blocks=4),
    }


def steps(shape: str, ffn: FFNConfig, compiled: bool, dry: bool) -> dict[str, Any]:
    """One `step` part."""
    config = PretrainConfig.from_flat(get_preset("small" if dry else shape))
    result = bench_step(
        config.shape(64 if dry else VOCABULARY),
        ffn,
        batch=2 if dry else 16,
        rounds=2 if dry else 20,
        precision="fp32" if dry else "bf16",
        compiled=compiled,
    )
    print(format_step(result), flush=True)
    return result


def experiment(shape: str, compiled: bool, args: argparse.Namespace, output: Path) -> list[str]:
    """The command of one `time-to-loss` part."""
    command = [sys.executable, "-m", "fastffn", "experiment", "time-to-loss", "--data", args.data, "--output", output]
    if args.validation:
        command += ["--validation", args.validation]
    if args.dry_run:
        command += ["--preset", "small", "--layers", "2", "--d-model", "16", "--heads", "2", "--sequence", "16"]
        command += ["--batch", "2", "--steps", "10", "--warmup-steps", "2", "--rewarm-steps", "2"]
        command += ["--tokenizer", "train:300", "--rates", "0.001", "--lengths", "0.8"]
    else:
        sizes = PretrainConfig.from_flat(get_preset(shape))
        command += ["--preset", "gpt2-small", "--layers", sizes.layers, "--tokenizer", args.tokenizer]
        command += ["--batch", "16", "--steps", "960", "--warmup-steps", "60", "--rewarm-steps", "20"]
        command += ["--decay", "0.3", "--evaluate-every", "100", "--checkpoint-every", "960", "--precision", "bf16"]
        command += ["--rates", "0.0006", "--rates", "0.0012", "--lengths", "0.8", "--lengths", "0.9"]
    for recipe in RECIPES:
        command += ["--recipes", recipe]
    paired = "FASTFFN_DATA_DIR" in os.environ and not args.dry_run
    command += ["--seeds", "5" if paired else "0", "--confirm", "1", "--compile" if compiled else "--no-compile"]
    return [str(part) for part in command]


def train(shape: str, compiled: bool, args: argparse.Namespace, name: str, left: float) -> dict[str, Any] | None:
    """What `fastffn experiment` found; None if it needs another call."""
    output = args.runs / args.name / name
    try:
        subprocess.run(experiment(shape, compiled, args, output), check=True, timeout=left)
    except subprocess.TimeoutExpired:
        return None
    result: dict[str, Any] = read_json(output / "result.json")
    return result


def main() -> None:
    """Run what is missing, as far as the minutes go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="which machine it is: a folder of results")
    parser.add_argument("--data", required=True, help="text to train on, as `fastffn pretrain --data`")
    parser.add_argument("--validation", help="text to validate on; default: held out")
    parser.add_argument("--tokenizer", default="gpt2", help="GPT-2's: a folder, where there is no network")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which a call ends")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu-two-stage"), help="folder of the experiments' runs")
    parser.add_argument("--only", action="append", metavar="PART", help="this part and no other; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, without an accelerator too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that holds results of all machines")
    args = parser.parse_args()
    if not (torch.accelerator.is_available() or args.dry_run):
        parser.error("there is no accelerator; --dry-run runs toy sizes on the CPU")

    # A part gets the seconds that are left; None says that it needs more of them.
    parts: dict[str, Callable[[float], dict[str, Any] | None]] = {}
    shapes, ways = (SHAPES[:1], (False,)) if args.dry_run else (SHAPES, (False, True))
    for shape in shapes:
        for compiled in ways:
            for name, ffn in ffns(16 if args.dry_run else 768).items():
                part = partial(steps, shape, ffn, compiled, args.dry_run)
                parts[f"step-{shape}-{name}-{_way(compiled)}"] = lambda left, part=part: part()
    for shape in shapes:
        for compiled in ways:
            name = f"time-to-loss-{shape}-{_way(compiled)}"
            parts[name] = partial(train, shape, compiled, args, name)
    for name in args.only or ():
        if name not in parts:
            parser.error(f"there is no part '{name}'; there are {', '.join(parts)}")

    begun = time.perf_counter()
    for name, run in parts.items():
        path = args.results / args.name / f"{name}.json"
        if path.exists() or (args.only and name not in args.only):
            continue
        left = args.minutes * 60 - (time.perf_counter() - begun)
        # Compiling two models takes a minute or two.
        found = run(left) if left > (0 if args.dry_run else 120) else None
        if found is None:
            print(f"The minutes are over at {name}: the same command goes on.", flush=True)
            return
        write_json(path, {"part": name, "dry_run": args.dry_run, **found})
        print(f"{name}: done", flush=True)
    print("Everything is done.")


def _way(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


if __name__ == "__main__":
    main()
