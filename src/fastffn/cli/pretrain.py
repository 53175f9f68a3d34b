"""`fastffn pretrain`."""

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


@click.command(name="pretrain")
@click.option("--output", type=click.Path(path_type=Path), help="Run directory, created or continued.")
@click.option("--print-config", is_flag=True, help="Print all fields as YAML and stop.")
@click.option("--overwrite", is_flag=True, help="Delete another run in the output directory first.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    output: Path | None,
    preset: str | None,
    config_file: Path | None,
    print_config: bool,
    overwrite: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Pre-train a GPT-2 or a BERT in two stages, and a dense one beside it on the same tokens.

    Stage 1 trains with factorised FFNs; their factors are multiplied out; stage 2 goes on with an ordinary dense
    model. Fields come from the preset, then the YAML file, then the flags. The same command goes on with a run that
    was interrupted.

    Several processes: torchrun --nproc-per-node 8 -m fastffn pretrain ... (or accelerate launch).

    Example: fastffn pretrain --data my_texts/ --tokenizer train:8192 --steps 2000 --output runs/mine
    """
    from fastffn.train.rundir import dump_config

    config = run_config(ctx, preset, config_file, flags)
    if print_config:
        click.echo(dump_config(config), nl=False)
        return
    if output is None:
        raise ConfigError("--output is missing; name a directory for the run, such as runs/mine.")
    from transformers.utils import logging

    from fastffn.train import processes
    from fastffn.train.pretrain import pretrain

    logging.disable_progress_bar()  # for each checkpoint read or written: they would tear the stages' bars apart
    # With --json the standard output is JSON and nothing else.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        results = pretrain(config, output, overwrite=overwrite)
    if as_json and processes.is_main():
        click.echo(json.dumps(results))


add_run_options(command)
