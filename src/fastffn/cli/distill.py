"""`fastffn distill`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from fastffn.cli.options import field_options, json_option, path_argument
from fastffn.errors import ConfigError
from fastffn.train.distill.config import DistillConfig


@click.command(name="distill")
@path_argument("student", metavar="STUDENT")
@path_argument("teacher", metavar="TEACHER")
@click.option("--output", type=click.Path(path_type=Path), help="Run directory, created or continued.")
@click.option("--max-minutes", type=float, help="Stop after so long, with a checkpoint.  [default: no limit]")
@click.option("--overwrite", is_flag=True, help="Delete another run in the output directory first.")
@json_option
def command(
    student: Path,
    teacher: Path,
    output: Path | None,
    max_minutes: float | None,
    overwrite: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Recover the quality of the converted checkpoint STUDENT: the dense checkpoint TEACHER, its original, teaches it.

    First each FFN of the student learns what the teacher's dense one computes; then the whole student learns the
    teacher's outputs. The model is written into OUTPUT/student. The same command goes on with a run that was
    interrupted, or that --max-minutes ended.

    Example: fastffn distill my_student my_gpt2 --data my_texts/ --steps 2000 --output runs/recovered
    """
    if output is None:
        raise ConfigError("--output is missing; name a directory for the run, such as runs/recovered.")
    chosen = {name: value for name, value in flags.items() if value is not None}
    config = DistillConfig(student=str(student), teacher=str(teacher), **chosen)
    from transformers.utils import logging

    from fastffn.train.distill.run import distill

    logging.disable_progress_bar()  # for each checkpoint read or written: they would tear the phases' bars apart
    # With --json the standard output is JSON and nothing else.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        results = distill(config, output, overwrite=overwrite, max_minutes=max_minutes)
    if as_json:
        click.echo(json.dumps(results))


command.params.extend(field_options(DistillConfig))
