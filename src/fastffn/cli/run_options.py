"""The options that describe a pre-training run, shared by the commands that make one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from fastffn.cli.options import field_options, option_for
from fastffn.errors import ConfigError, did_you_mean
from fastffn.train.config import PRESETS, RATES, PretrainConfig, ffn_option_types, get_preset, start_fields


def add_run_options(command: click.Command, *, preset: str | None = None) -> None:
    """Adds `--preset`, which is `preset` by default, `--config`, and a flag for every field."""
    command.params.append(
        click.Option(
            ["--preset"],
            default=preset,
            help=f"Fields to start from: {', '.join(PRESETS)}.  [default: {preset or 'none'}]",
        )
    )
    command.params.append(
        click.Option(["--config", "config_file"], type=click.Path(path_type=Path), help="YAML file of fields.")
    )
    command.params.extend(field_options(PretrainConfig, get_preset(preset), source=preset or "default"))
    command.params.extend(
        option_for(name, kind, f"option of the FFN kind {owners}")
        for name, (kind, owners) in ffn_option_types().items()
    )


def run_config(
    ctx: click.Context, preset: str | None, config_file: Path | None, flags: dict[str, Any]
) -> PretrainConfig:
    """The run that the options describe: the preset's fields, then the YAML file's, then the flags'.

    Raises:
        ConfigError: a field is unknown or out of range.
        CheckpointError: `--init-from` names no dense checkpoint.
    """
    chosen = {name: value for name, value in flags.items() if value is not None}
    written = _typed(ctx, _fields_of(config_file), config_file) if config_file is not None else {}
    given = {name for name, value in (written | chosen).items() if value is not None}
    values = over(over(get_preset(preset), written, given), chosen, given)
    if values.get("init_from"):
        found = start_fields(values["init_from"])
        values |= {name: value for name, value in found.items() if name not in chosen and name not in written}
    return PretrainConfig.from_flat(values)


def over(below: dict[str, Any], above: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Fields `below`, replaced by those `above`, which also put aside what would contradict them.

    Args:
        below: all fields.
        above: some of them.
        given: names of those that the user set anywhere, a preset's own being the others.
    """
    values = dict(below)
    # Naming one of the two lengths replaces the other.
    for length, other in (("steps", "epochs"), ("epochs", "steps")):
        if above.get(length) is not None:
            values[other] = None
    # A learning rate is that of all parts of the model, unless those are named too.
    if "learning_rate" in above:
        values |= dict.fromkeys(RATES)
    new = values | above
    # Another kind does not have this one's options.
    if new["ffn"] != values["ffn"]:
        values |= dict.fromkeys(ffn_option_types())
    if new["ffn"] == "dense":
        # The run that stands beside two stages, by itself.
        values["factor_learning_rate"] = None
    if (new["ffn"] != values["ffn"] and new["ffn"] != "dense") or _spared(new) != _spared(values):
        # A preset's rates go with its FFNs that are never factorised, which go with its kind.
        values |= {name: None for name in _CHOSEN_TOGETHER if name not in given}
        if "learning_rate" not in given:
            values["learning_rate"] = values["dense_learning_rate"] or values["learning_rate"]
    return values | above


_CHOSEN_TOGETHER = ("dense_layers", "factor_learning_rate", "ffn_learning_rate")


def _spared(values: dict[str, Any]) -> int:
    """FFNs that are never factorised; a model of one layer has none to spare."""
    return 0 if values["layers"] == 1 else values["dense_layers"] or 0


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
            # Numbers and truth values as they would be typed: of a number, click would take what fits.
            given = repr(value) if isinstance(value, (bool, int, float)) else value
            typed[name] = None if value is None else parameters[name].type.convert(given, parameters[name], ctx)
        except click.UsageError as error:
            raise ConfigError(f"{path}: {name} is {value!r}: {error.message}") from error
    return typed
