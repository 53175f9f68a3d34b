"""What neuron trees buy in a language model: a small GPT-2 down UltraFastBERT's ladder, from dense to one deep tree.

The claim to test is that a tree buys quality with parameters at a constant number of active neurons. So every tree
stands beside dense FFNs of its active width and of its total width, and beside shallower trees.
"""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fastffn.convert.files import new_directory, write_json, write_text
from fastffn.convert.fresh import fresh_model
from fastffn.errors import ConfigError, did_you_mean
from fastffn.experiments.cells import opened, together
from fastffn.experiments.inference_time import check
from fastffn.experiments.rungs import Rung, ladder
from fastffn.experiments.tree_usage import tree_usage
from fastffn.measure.machine import describe_machine
from fastffn.measure.step import compare_steps
from fastffn.nn import LeafTreeConfig, MoEConfig, NeuronTreeConfig, build
from fastffn.train.config import PretrainConfig
from fastffn.train.pretrain import pretrain
from fastffn.train.processes import say
from fastffn.train.text import read_text

ROUNDS = 8
# Tokens that the gate compares.
GATED = 256


def tree_ladder(
    config: PretrainConfig, output: Path, *, seeds: int = 1, rungs: tuple[str, ...] = (), timing: bool = True
) -> dict[str, Any]:
    """Makes the table; the same call goes on with what was interrupted.

    Args:
        config: a dense run; its seed is the first one.
        output: directory for the cells, the runs, `table.md` and `result.json`.
        seeds: number of seeds.
        rungs: names of some of `fastffn.experiments.rungs.ladder`; empty: all.
        timing: whether to time training steps, where that has not been done yet.

    Returns:
        What is in `result.json`: for each rung the validation loss of every seed and how tokens spread over its trees.

    Raises:
        ConfigError: `config` names FFNs of its own or predicts masked tokens, a rung is unknown, or there are no seeds.
        OutputError: `output` holds something else.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; it must be at least 1.")
    if config.ffn != "dense" or config.d_hidden is not None or config.init_from is not None:
        raise ConfigError("The ladder chooses the FFNs itself; leave out ffn and its options, d_hidden and init_from.")
    if config.masked:
        raise ConfigError(f"The ladder is of models that predict the next token, not of {config.architecture}.")
    known = ladder()
    for name in rungs:
        if name not in known:
            raise ConfigError(f"Unknown rung '{name}'; there are {', '.join(known)}.{did_you_mean(name, known)}")
    chosen = [rung for name, rung in known.items() if not rungs or name in rungs]
    settings = {"experiment": "tree-ladder"} | {n: v for n, v in config.to_flat().items() if n != "seed"}
    with opened(output, settings) as cells:
        if not (output / "tokenizer").is_dir():
            with new_directory(output / "tokenizer") as partial_directory:
                read_text(config, None).tokenizer.save_pretrained(partial_directory)
        config = dataclasses.replace(config, tokenizer=str(output / "tokenizer"))
        found: dict[str, Any] = {rung.name: _facts(rung, config) for rung in chosen}
        # One seed of everything, then the next: what is interrupted is a table with fewer seeds.
        for seed in range(config.seed, config.seed + seeds):
            for rung in chosen:
                run = output / "runs" / f"{rung.name}-seed-{seed}"
                cell = cells.get(f"{rung.name}-seed-{seed}", partial(_train, rung, run_of(config, rung, seed), run))
                found[rung.name]["seeds"].append(cell)
        steps = cells.get(together("step-seconds", found), partial(_time, chosen, config)) if timing else None
        result = {
            "config": {name: value for name, value in settings.items() if name != "experiment"},
            "seeds": seeds,
            "rungs": found,
            "step": steps,
            "machine": describe_machine(),
        }
        write_json(output / "result.json", result)
        write_text(output / "table.md", report(result))
    return result


def run_of(config: PretrainConfig, rung: Rung, seed: int) -> PretrainConfig:
    """The run that trains a rung."""
    changes = dict(rung.changes)
    if rung.ffn != "dense":
        # Over the rate that dense rungs' FFNs have.
        rate = rung.trees_rate * (config.ffn_learning_rate or config.learning_rate)
        changes |= {"factor_learning_rate": None if rate == config.learning_rate else rate, "ffn_learning_rate": None}
    return dataclasses.replace(config, ffn=rung.ffn, ffn_options=rung.options, baseline=False, seed=seed, **changes)


def _facts(rung: Rung, config: PretrainConfig) -> dict[str, Any]:
    """Neurons that a token meets, neurons in all, and what the rung is."""
    run = run_of(config, rung, config.seed)
    ffn = run.ffn_config()
    if isinstance(ffn, NeuronTreeConfig):
        active, total = ffn.active_neurons, ffn.neurons + ffn.shared
    elif isinstance(ffn, LeafTreeConfig):
        active, total = ffn.depth + (ffn.leaf_width or 0), ffn.leaves * (ffn.leaf_width or 0)
    elif isinstance(ffn, MoEConfig):
        active, total = ffn.active * (ffn.expert_width or 0), ffn.experts * (ffn.expert_width or 0)
    else:
        active = total = run.d_hidden or 4 * run.d_model
    facts = {
        "active": active,
        "total": total,
        "note": rung.note,
        "options": rung.options,
        "trees_rate": rung.trees_rate,
    }
    return facts | {"seeds": []}


def _train(rung: Rung, run: PretrainConfig, directory: Path) -> dict[str, Any]:
    say(f"\n{rung.name} ({rung.note or rung.ffn}), seed {run.seed}")
    stage = pretrain(run, directory)["stages"][rung.ffn]
    kept = {name: stage[name] for name in ("validation_loss", "steps", "tokens", "curve")}
    return kept | {"usage": tree_usage(run, directory) if rung.ffn == "neuron_tree" else None}


def _time(rungs: list[Rung], config: PretrainConfig) -> dict[str, Any]:
    """Seconds of a training step of each rung, alternating, after the gate."""
    vocabulary = len(read_text(config, Path(config.tokenizer)).tokenizer)
    models: dict[str, Any] = {}
    for rung in rungs:
        run = run_of(config, rung, config.seed)
        ffn = run.ffn_config() if rung.ffn != "dense" else None
        if ffn is not None:
            torch.manual_seed(config.seed)
            check(rung.name, build(ffn).eval(), torch.randn(GATED, config.d_model))
        models[rung.name] = fresh_model(run.shape(vocabulary), ffn)
    batch, timings = compare_steps(
        models,
        sequence=config.sequence,
        vocabulary=vocabulary,
        most=config.batch,
        autocast=None,
        rounds=ROUNDS,
        seconds_a_step=5.0,
    )
    seconds = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
    return {"sequences": batch, "seconds": seconds, "machine": describe_machine()}


def table(result: dict[str, Any]) -> str:
    """The rungs in Markdown."""
    steps = result["step"]
    lines = []
    for name, rung in result["rungs"].items():
        losses = [seed["validation_loss"] for seed in rung["seeds"]]
        spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        usages = [seed["usage"] for seed in rung["seeds"] if seed["usage"] is not None]
        line = [
            name,
            rung["note"],
            f"{rung['active']:,}",
            f"{rung['total']:,}",
            f"{statistics.mean(losses):.3f}{spread}",
            f"{statistics.mean(u['effective_leaves'] for u in usages):.1f} of {usages[0]['leaves']}" if usages else "",
        ]
        if steps is not None:
            line.append(f"{steps['seconds'][name]['median']:.3f}" if name in steps["seconds"] else "")
        lines.append(line)
    headers = ["rung", "", "active", "total", "validation loss", "leaves in use"]
    headers += ["seconds a step"] if steps is not None else []
    alignment = ("left", "left") + ("right",) * (len(headers) - 2)
    return tabulate(lines, headers=headers, tablefmt="github", colalign=alignment, disable_numparse=True)


def report(result: dict[str, Any]) -> str:
    """The table with what it was made on."""
    config, machine = result["config"], result["machine"]
    lines = [
        "# The ladder of trees",
        "",
        table(result),
        "",
        f"GPT-2 of {config['layers']} layers x {config['d_model']}, sequence {config['sequence']}, "
        f"{config['batch'] * config['sequence']:,} tokens a step, {config['steps']} steps at a peak learning rate of "
        f"{config['learning_rate']:g} on {config['data']}; {result['seeds']} seed(s), mean and standard deviation. A "
        "tree of depth d has levels 0 to d; `TREESxDEPTH+N` has a dense part of N neurons beside it. Leaves in use: "
        "the exponential of the entropy of how validation tokens spread over the last level's neurons, mean over trees "
        "and layers. Seconds: a training step, alternating with the others'.",
        "",
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['versions']['torch']}; commit "
        f"{machine['commit'] or 'unknown'}.",
        "",
    ]
    return "\n".join(lines)
