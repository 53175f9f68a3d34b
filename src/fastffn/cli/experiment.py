"""`fastffn experiment`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from fastffn.cli.options import json_option
from fastffn.cli.run_options import add_run_options, run_config
from fastffn.errors import ConfigError


@click.group(name="experiment")
def command() -> None:
    """Make the tables of the papers, and those they lack.

    Example: fastffn experiment wikitext-2 --data my_texts/ --steps 2000 --output runs/wikitext-2
    """


@command.command(name="wikitext-2")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of all runs, created or continued.")
@click.option("--seeds", type=int, default=3, show_default=True, help="Number of seeds.")
@click.option("--tune-steps", type=int, default=300, show_default=True, help="Steps of fine-tuning on WikiText-2.")
@click.option("--tune-learning-rate", type=float, default=5e-4, show_default=True, help="Peak rate of fine-tuning.")
@json_option
@click.pass_context
def wikitext_2(
    ctx: click.Context,
    output: Path | None,
    seeds: int,
    tune_steps: int,
    tune_learning_rate: float,
    preset: str | None,
    config_file: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Fine-tune on WikiText-2 after four kinds of pre-training: none, two-stage, dense by tokens, dense by seconds.

    The pre-training is that of `fastffn pretrain`, with the same options. WikiText-2 comes from the folder that
    FASTFFN_DATA_DIR names, or by its name from a hub. The same command goes on with what was interrupted.

    Example: fastffn experiment wikitext-2 --data my_texts/ --steps 2000 --output runs/wikitext-2
    """
    config = run_config(ctx, preset, config_file, flags)
    if output is None:
        raise ConfigError("--output is missing; name a directory for the runs, such as runs/wikitext-2.")
    from transformers.utils import logging

    from fastffn.experiments.wikitext2 import Tuning, table, wikitext2_table
    from fastffn.train import processes

    logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        tuning = Tuning(steps=tune_steps, learning_rate=tune_learning_rate)
        result = wikitext2_table(config, output, seeds=seeds, tuning=tuning)
        processes.say(f"\n{table(result)}\n\nTable: {output / 'table.md'}")
    if as_json and processes.is_main():
        click.echo(json.dumps(result))


add_run_options(wikitext_2)


@command.command(name="fff-table-1")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of all results, created or continued.")
@click.option(
    "--images", multiple=True, default=("digits",), show_default=True, help="digits, mnist or usps; may be repeated."
)
@click.option("--seeds", type=int, default=3, show_default=True, help="Number of seeds.")
@click.option("--width", type=int, default=128, show_default=True, help="Hidden neurons in training.")
@click.option(
    "--leaf-widths", type=int, multiple=True, default=(8, 4, 2, 1), show_default=True, help="One leaf tree each."
)
@click.option("--epochs", type=int, help="Passes over the training images.  [default: 150 digits, 40 usps, 15 mnist]")
@click.option("--repairs", type=int, help="Seeds of the first leaf width's repaired trees; 0: none.  [default: all]")
@click.option(
    "--timing/--no-timing", default=True, help="Time inference; no: leave it to a later call.  [default: yes]"
)
@json_option
def fff_table_1(
    output: Path | None,
    images: tuple[str, ...],
    seeds: int,
    width: int,
    leaf_widths: tuple[int, ...],
    epochs: int | None,
    repairs: int | None,
    timing: bool,
    as_json: bool,
) -> None:
    """Leaf trees as image classifiers: the FFF paper's Table 1, with the rows it lacks and the known repairs.

    The digits come with scikit-learn; mnist and usps are read from the folder that FASTFFN_DATA_DIR names
    (vision/mnist.npz, vision/usps.npz). The same command goes on with what was interrupted.

    Example: fastffn experiment fff-table-1 --images digits --seeds 1 --output runs/fff-table-1
    """
    if output is None:
        raise ConfigError("--output is missing; name a directory for the results, such as runs/fff-table-1.")
    from fastffn.experiments.fff_table import fff_table, report

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = fff_table(
            output,
            images=images,
            seeds=seeds,
            width=width,
            leaf_widths=leaf_widths,
            epochs=epochs,
            repairs=repairs,
            timing=timing,
        )
        click.echo(f"\n{report(result)}\nTable: {output / 'table.md'}")
    if as_json:
        click.echo(json.dumps(result))


@command.command(name="tree-ladder")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of all runs, created or continued.")
@click.option("--seeds", type=int, default=1, show_default=True, help="Number of seeds.")
@click.option("--rungs", multiple=True, help="Name of a rung, such as tree-8x8; may be repeated.  [default: all]")
@click.option("--timing/--no-timing", default=True, help="Time steps; no: leave it to a later call.  [default: yes]")
@json_option
@click.pass_context
def tree_ladder(
    ctx: click.Context,
    output: Path | None,
    seeds: int,
    rungs: tuple[str, ...],
    timing: bool,
    preset: str | None,
    config_file: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Neuron trees in a small GPT-2, from dense to one deep tree: what depth buys at equal active neurons.

    The runs are those of `fastffn pretrain`, with the same options but for the FFN, which the ladder chooses (preset:
    small). The same command goes on with what was interrupted.

    Example: fastffn experiment tree-ladder --rungs dense-72 --rungs tree-8x8 --output runs/ladder
    """
    config = run_config(ctx, preset, config_file, flags)
    if output is None:
        raise ConfigError("--output is missing; name a directory for the runs, such as runs/ladder.")
    from transformers.utils import logging

    from fastffn.experiments.tree_ladder import report
    from fastffn.experiments.tree_ladder import tree_ladder as climb
    from fastffn.train import processes

    logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = climb(config, output, seeds=seeds, rungs=rungs, timing=timing)
        processes.say(f"\n{report(result)}\nTable: {output / 'table.md'}")
    if as_json and processes.is_main():
        click.echo(json.dumps(result))


add_run_options(tree_ladder, preset="small")


@command.command(name="time-to-loss")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of all runs, created or continued.")
@click.option(
    "--recipes",
    multiple=True,
    help="Name of a recipe, such as naive; may be repeated; dense always runs.  [default: the best of each sort]",
)
@click.option(
    "--rates",
    type=float,
    multiple=True,
    default=(1e-3, 2e-3, 4e-3),
    show_default=True,
    help="Grid of peak learning rates, the same for every recipe.",
)
@click.option(
    "--lengths",
    type=float,
    multiple=True,
    default=(0.6, 0.8, 0.9, 1.0),
    show_default=True,
    help="Lengths of runs over --steps.",
)
@click.option(
    "--seeds", type=int, default=5, show_default=True, help="Paired seeds beside the sweep's; 0: sweep alone."
)
@click.option("--confirm", type=int, default=2, show_default=True, help="How many recipes the paired seeds compare.")
@click.option("--timing/--no-timing", default=True, help="Time steps; no: leave it to a later call.  [default: yes]")
@json_option
@click.pass_context
def time_to_loss(
    ctx: click.Context,
    output: Path | None,
    recipes: tuple[str, ...],
    rates: tuple[float, ...],
    lengths: tuple[float, ...],
    seeds: int,
    confirm: int,
    timing: bool,
    preset: str | None,
    config_file: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Two-stage against tuned dense training: what the same validation loss costs, in FLOPs and in seconds.

    The runs are those of `fastffn pretrain`, with the same options but for FFN and stages, which the recipes choose
    (preset: small). WikiText-2, on which confirmed models are scored, comes from the folder that FASTFFN_DATA_DIR
    names, or by its name from a hub. The same command goes on with what was interrupted.

    Example: fastffn experiment time-to-loss --recipes naive --recipes half-2x --seeds 0 --output runs/time-to-loss
    """
    config = run_config(ctx, preset, config_file, flags)
    if output is None:
        raise ConfigError("--output is missing; name a directory for the runs, such as runs/time-to-loss.")
    from transformers.utils import logging

    from fastffn.experiments.time_to_loss import time_to_loss as compare
    from fastffn.experiments.time_to_loss_report import report
    from fastffn.train import processes

    logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = compare(
            config,
            output,
            names=recipes,
            rates=rates,
            lengths=lengths,
            seeds=seeds,
            confirm=confirm,
            timing=timing,
        )
        processes.say(f"\n{report(result)}\nTable: {output / 'table.md'}")
    if as_json and processes.is_main():
        click.echo(json.dumps(result))


add_run_options(time_to_loss, preset="small")
