"""Keeps what runs of `fastffn pretrain` came to: `python benchmarks/collect_runs.py OUT.json NOTE RUN_DIRECTORY...`.

For each run its configuration (what all have in common stands once), final validation loss, FLOPs as `fastffn
experiment time-to-loss` counts them, those over the FLOPs of as many dense steps, and its validations.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from fastffn.convert.files import read_json, write_json
from fastffn.convert.fresh import step_bound
from fastffn.experiments.run_cost import curve, flops_of, record_of
from fastffn.measure.machine import describe_machine
from fastffn.nn import DenseConfig
from fastffn.train.config import PretrainConfig
from fastffn.train.rundir import read_config


def kept_of(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and what is kept of the finished run in a directory."""
    results = read_json(directory / "results.json")
    config = PretrainConfig.from_flat(read_config(directory / "config.yaml"))
    if config.restart or (config.baseline and config.ffn != "dense"):
        raise SystemExit(f"{directory} has two models in it; collect runs with --no-baseline and without --restart.")
    vocabulary = results["text"]["vocabulary"]
    price = flops_of(config, vocabulary)
    # A narrower model is judged by the whole one too.
    whole = dataclasses.replace(config.shape(vocabulary), d_hidden=None)
    dense = step_bound(whole, DenseConfig()).dense * config.batch
    record = record_of(config, results)
    points = curve(record, price)
    spent = points[-1][0]
    assert config.steps is not None
    kept = {
        "run": directory.name,
        "loss": record["loss"],
        "flops": spent,
        "flops_over_dense": round(spent / (dense * config.steps), 4),
        "clock_seconds": record["clock_seconds"],
        "commit": results["machine"]["commit"],
        "curve": points,
    }
    return config.to_flat(), kept


def main(target: str = "", note: str = "", *directories: str) -> None:
    """See the module."""
    if not directories:
        raise SystemExit(__doc__)
    found = [kept_of(Path(directory)) for directory in directories]
    first = found[0][0]
    same = {name for name in first if all(config[name] == first[name] for config, _ in found)}
    runs = [{n: v for n, v in config.items() if n not in same} | kept for config, kept in found]
    result = {"note": note, "config": {n: v for n, v in first.items() if n in same}, "runs": runs}
    write_json(Path(target), result | {"machine": describe_machine()})
    for run in runs:
        print(f"{run['run']}: {run['loss']:.4f} for {run['flops_over_dense']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
