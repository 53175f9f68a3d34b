"""Flags made from a dataclass: its fields are the only place where they are written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click


def json_option(command: Any) -> Any:
    """Adds `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")(command)


def text_options(command: Any) -> Any:
    """Adds `--text-column` and `--document-separator` to a command that reads text."""
    separator = click.option(
        "--document-separator",
        default="<|endoftext|>",
        show_default=True,
        help="Line that ends a document in text files; 'blank': blank lines; empty: a file is a document.",
    )
    column = click.option(
        "--text-column",
        default="text",
        show_default=True,
        help="Column or key that holds the text, where there are such.",
    )
    return column(separator(command))


def path_argument(name: str, **settings: Any) -> Callable[[Any], Any]:
    """A positional argument that is a path."""
    return click.argument(name, type=click.Path(path_type=Path), **settings)


def field_options(
    config: type, values: Mapping[str, Any] | None = None, *, source: str = "default"
) -> list[click.Option]:
    """One option for each field of a dataclass that carries a `help`, without defaults of its own.

    The help names the field's value after `source`: its default, or what `values` has.
    """
    hints = get_type_hints(config)
    options = []
    for field in dataclasses.fields(config):
        if "help" not in field.metadata or get_origin(hints[field.name]) is dict:
            continue
        value = field.default if values is None else values[field.name]
        default = "" if value in (None, dataclasses.MISSING) else f"  [{source}: {value}]"
        options.append(option_for(field.name, hints[field.name], field.metadata["help"] + default))
    return options


def option_for(name: str, hint: Any, help: str) -> click.Option:
    """The option `--name` for a value of the type `hint`; a truth value becomes `--name / --no-name`."""
    flag = "--" + name.replace("_", "-")
    kinds = [a for a in get_args(hint) if a is not type(None)] or [hint]
    if get_origin(hint) is Literal:
        return click.Option([flag, name], type=click.Choice(list(get_args(hint))), default=None, help=help)
    if kinds[0] is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=help)
    return click.Option([flag, name], type=kinds[0], default=None, help=help)
