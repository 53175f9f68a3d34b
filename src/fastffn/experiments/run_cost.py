"""What a run costs: FLOPs, counted, and seconds, reckoned from steps timed side by side.

Losses are the same on a busy machine, seconds are not. So a run's seconds are its steps, times the seconds of a step
measured on a machine with nothing else to do, plus what the switches of stages took there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastffn.convert.api import place_fresh
from fastffn.convert.fresh import fresh_model, step_bound
from fastffn.convert.match import after_first
from fastffn.measure.flops import count_flops
from fastffn.measure.machine import describe_machine
from fastffn.measure.step import compare_steps
from fastffn.nn import DenseConfig, DenseFFN
from fastffn.registry import kind_of
from fastffn.train.config import PretrainConfig
from fastffn.train.plan import plan_stages
from fastffn.train.pretrain import pretrain

ROUNDS = 20


@dataclass(frozen=True)
class Price:
    """What the parts of a run cost, in FLOPs or in seconds.

    Attributes:
        dense, factorised: a training step.
        start: factors made from dense weights.
        merge: factors multiplied out.
    """

    dense: float
    factorised: float
    start: float
    merge: float


def flops_of(config: PretrainConfig, vocabulary: int) -> Price:
    """The FLOPs of matrix products, the singular value decompositions of a start among them."""
    shape = config.shape(vocabulary)
    if config.ffn == "dense":
        flops = step_bound(shape, DenseConfig()).dense * config.batch
        return Price(flops, flops, 0, 0)
    ffn = config.ffn_config()
    bound = step_bound(shape, ffn, config.dense_layers or 0)
    dense, kind = DenseFFN(DenseConfig().fitted_to(ffn)), kind_of(ffn)
    made = []
    start = count_flops(lambda: made.append(kind.module.from_dense(dense, ffn)), causal=False)
    merge = count_flops(made[0].merge, causal=False)
    layers = config.layers - (config.dense_layers or 0)
    return Price(bound.dense * config.batch, bound.factorised * config.batch, layers * start, layers * merge)


def seconds_of(runs: Mapping[str, PretrainConfig], vocabulary: int, directory: Path) -> dict[str, Any]:
    """Times the steps of runs, alternating in one process, and the switches of each.

    Args:
        runs: by name, the first dense; all of one shape but for the width of smaller dense models.
        vocabulary: number of tokens.
        directory: for runs of a few steps, from which the seconds of a switch are taken.

    Returns:
        `prices`: a `Price` in seconds for each name, as a dictionary; `steps`: the timings; `sequences` in a step.
    """
    first = next(iter(runs.values()))
    models: dict[str, Any] = {"dense": fresh_model(first.shape(vocabulary))}
    for name, run in runs.items():
        if run.ffn != "dense":
            models[name] = fresh_model(run.shape(vocabulary), run.ffn_config(), dense_layers=run.dense_layers or 0)
        elif run.d_hidden != first.d_hidden:
            models[name] = fresh_model(run.shape(vocabulary))
    batch, timings = compare_steps(
        models,
        sequence=first.sequence,
        vocabulary=vocabulary,
        most=first.batch,
        autocast=None,
        rounds=ROUNDS,
        seconds_a_step=10.0,
    )
    prices = {}
    for name, run in runs.items():
        # Where the whole batch would take long, a part of it was timed.
        dense = timings["dense"].median * run.batch / batch
        if run.ffn == "dense":
            own = timings.get(name, timings["dense"]).median * run.batch / batch
            prices[name] = Price(own, own, 0.0, 0.0)
            continue
        start, merge = _switch_seconds(run, vocabulary, directory / name)
        prices[name] = Price(dense, timings[name].median * run.batch / batch, start, merge)
    return {
        "prices": {name: dataclasses.asdict(price) for name, price in prices.items()},
        "steps": {name: dataclasses.asdict(timing) for name, timing in timings.items()},
        "sequences": batch,
        "machine": describe_machine(),
    }


def _switch_seconds(config: PretrainConfig, vocabulary: int, directory: Path) -> tuple[float, float]:
    """Seconds of the start of the factors and of the merge; writing and loading checkpoints for them included."""
    steps = max(4, round(2 / config.dense_warmup) if config.dense_warmup else 0)
    run = dataclasses.replace(config, steps=steps, evaluate_every=steps, checkpoint_every=steps, validation_blocks=1)
    stages = pretrain(run, directory)["stages"]
    merge = stages["merge"]["seconds"] + stages["stage2"]["loading_seconds"]
    if "factorise" in stages:
        return stages["factorise"]["seconds"] + stages["stage1"]["loading_seconds"], merge
    model = fresh_model(config.shape(vocabulary))
    begun = time.perf_counter()
    place_fresh(model, config.ffn_config(), filter=after_first(model, config.dense_layers or 0))
    return time.perf_counter() - begun, merge


def record_of(config: PretrainConfig, results: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run: its stages with their validations, its final loss, its own seconds on the clock."""
    assert config.steps is not None
    stages = []
    for name, stage in plan_stages(config, config.steps).items():
        found = results["stages"][name]
        curve = [[point["step"], point["loss"]] for point in found["curve"]]
        kept = {"name": name, "factorised": stage.factorised, "begin": stage.begin, "end": stage.end}
        stages.append(kept | {"own_seconds": found["own_seconds"], "curve": curve})
    last = results["stages"][stages[-1]["name"]]
    return {"loss": last["validation_loss"], "clock_seconds": last["seconds"], "stages": stages}


def curve(record: dict[str, Any], price: Price) -> list[tuple[float, float]]:
    """`(cost, validation loss)` of a run's validations; the last one is the whole run's cost."""
    points = []
    spent = 0.0
    before = None
    for stage in record["stages"]:
        if stage["factorised"]:
            spent += price.start
        elif before is not None and before["factorised"]:
            spent += price.merge
        a_step = price.factorised if stage["factorised"] else price.dense
        points += [(spent + (step - stage["begin"]) * a_step, loss) for step, loss in stage["curve"]]
        spent += (stage["end"] - stage["begin"]) * a_step
        before = stage
    assert points[-1][0] == spent, "a run is validated after its last step"
    return points
