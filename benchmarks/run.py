"""Everything that is measured, in one call: `python benchmarks/run.py [NAME]`.

Writes `benchmarks/results/bench-step/<case>-<NAME>.json` for each case, and prints the tables. NAME says which machine
it was, such as `epyc-2cores`. On an accelerator the cases run in bfloat16 too, eager and compiled.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastffn.bench.step import bench_step, format_step
from fastffn.convert.files import write_json
from fastffn.train.config import PretrainConfig, get_preset

RESULTS = Path(__file__).parent / "results" / "bench-step"
VOCABULARY = {"demo": 4096, "seed": 50257, "gpt2-small": 50257}
# (preset, rank; None: a quarter of the width)
CASES = [("demo", None), ("seed", 8), ("seed", None), ("gpt2-small", None)]


def main() -> None:
    """Runs all cases."""
    name = sys.argv[1] if len(sys.argv) > 1 else "here"
    ways = [("fp32", False)]
    if torch.accelerator.is_available():
        ways += [("bf16", False), ("bf16", True)]
    for preset, rank in CASES:
        config = PretrainConfig.from_flat(get_preset(preset) | {"ffn": "low_rank", "rank": rank, "dense_layers": 0})
        ffn = config.ffn_config()
        for precision, compiled in ways:
            result = bench_step(
                config.shape(VOCABULARY[preset]),
                ffn,
                batch=config.micro_batch or config.batch,
                precision=precision,
                compiled=compiled,
            )
            case = f"{preset}-rank{ffn.to_dict()['rank']}-{precision}{'-compiled' if compiled else ''}"
            write_json(RESULTS / f"{case}-{name}.json", result)
            print(f"== {case}\n{format_step(result)}\n", flush=True)


if __name__ == "__main__":
    main()
