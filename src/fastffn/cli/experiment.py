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
    preset: str,
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
    processes.leave()


add_run_options(wikitext_2)
