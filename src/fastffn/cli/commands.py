"""The group of commands, and how errors reach the user."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
import traceback
from typing import Any

import click

from fastffn.errors import ConfigError, FastFFNError, MainProcessError, did_you_mean

# Each name is a file in this folder with a click command `command`.
COMMANDS = {
    "pretrain": "pre-train a GPT in two stages, and a dense one beside it",
    "distill": "recover a converted model's quality from its dense original",
    "merge": "multiply out the factors of a checkpoint",
    "convert": "replace the FFNs of a model that exists",
    "evaluate": "measure a model's quality",
    "experiment": "make the tables of the papers, and those they lack",
    "bench": "measure speed, beside the bound that arithmetic gives",
    "info": "versions, devices, kinds of FFN, environment variables",
}


class _Commands(click.Group):
    """Loads a command's file when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"fastffn.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"There is no command '{args[0]}'.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastffn")
def cli() -> None:
    """Cheap feed-forward networks for Transformers, in training and in inference, with honest prices.

    Example: fastffn pretrain --preset demo --output runs/demo
    """


def run() -> None:
    """Runs the command line and ends the process; an error of ours becomes one paragraph and its exit code."""
    if "RANK" not in os.environ:
        sys.exit(exit_code())
    # A launcher started this process, with others beside it.
    from fastffn.train import processes

    try:
        code = exit_code()
    except Exception:
        traceback.print_exc()
        code = 1
    processes.leave(code)


def exit_code() -> int:
    """Runs the command line; returns the exit code."""
    # Libraries leave the screen to us: no notices below errors, and bars only on a terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("\nInterrupted. A run goes on from its last checkpoint with the same command.", file=sys.stderr)
        return 130
    except MainProcessError as error:
        return error.exit_code
    except FastFFNError as error:
        # Of a mistake that every process finds, the first one says it.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(textwrap.fill(f"Error: {error}", 100, break_on_hyphens=False), file=sys.stderr)
        return error.exit_code
    return 0
