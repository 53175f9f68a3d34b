"""`fastffn pretrain`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from fastffn.cli.options import field_options, json_option, option_for
from fastffn.errors import ConfigError, did_you_mean
from fastffn.train.config import PRESETS, PretrainConfig, ffn_option_types, get_preset, start_fields


def _fields_of(path: Path) -> dict[str, Any]:
    from fastffn.train.rundir import read_config

    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {what}; --config names a YAML file of fields, such as a run's config.yaml.")
    return read_config(path)


def _typed(ctx: click.Context, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Values of a YAML file as the flags of the same names would have taken them."""
    parameters = {parameter.name: parameter for parameter in ctx.command.params}
    fields = {field.name for field in dataclasses.fields(PretrainConfig)} - {"ffn_options"} | set(ffn_option_types())
    typed = {}
    for name, value in values.items():
        if name not in fields or name not in parameters:
            raise ConfigError(f"{path}: unknown field '{name}'.{did_you_mean(name, fields)}")
        try:
            typed[name] = None if value is None else parameters[name].type.convert(value, parameters[name], ctx)
        except click.UsageError as error:
            raise ConfigError(f"{path}: {name} is {value!r}: {error.message}") from error
    return typed


@click.command(name="pretrain")
@click.option("--output", type=click.Path(path_type=Path), help="Run directory, created or continued.")
@click.option("--preset", default="demo", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file of fields.")
@click.option("--print-config", is_flag=True, help="Print all fields as YAML and stop.")
@click.option("--overwrite", is_flag=True, help="Delete another run in the output directory first.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    output: Path | None,
    preset: str,
    config_file: Path | None,
    print_config: bool,
    overwrite: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Pre-train a GPT-2 in two stages, and a dense one beside it on the same tokens.

    Stage 1 trains with factorised FFNs; their factors are multiplied out; stage 2 goes on with an ordinary dense
    GPT-2. Fields come from the preset, then the YAML file, then the flags. The same command goes on with a run that
    was interrupted.

    Several processes: torchrun --nproc-per-node 8 -m fastffn pretrain ... (or accelerate launch).

    Example: fastffn pretrain --data my_texts/ --tokenizer train:8192 --steps 2000 --output runs/mine
    """
    from fastffn.train.rundir import dump_config

    values = get_preset(preset)
    yaml_values = _typed(ctx, _fields_of(config_file), config_file) if config_file is not None else {}
    values |= yaml_values
    values |= {name: value for name, value in flags.items() if value is not None}
    # Naming one of the two lengths replaces the other, which a preset may have set.
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if flags.get(given) is not None and flags.get(other) is None:
            values[other] = None
    # So does a learning rate the preset's rates for parts of the model.
    if flags.get("learning_rate") is not None:
        values |= {name: flags.get(name) for name in ("dense_learning_rate", "factor_learning_rate")}
    if values.get("init_from"):
        chosen = set(yaml_values) | {name for name, value in flags.items() if value is not None}
        found = start_fields(values["init_from"])
        values |= {name: value for name, value in found.items() if name not in chosen}
    config = PretrainConfig.from_flat(values)
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
    processes.leave()


command.params.extend(field_options(PretrainConfig))
command.params.extend(
    option_for(name, kind, f"option of the FFN kind {owners}") for name, (kind, owners) in ffn_option_types().items()
)
