"""The `fastffn` command, one file a subcommand. Heavy imports happen inside the functions."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `fastffn` command."""
    try:
        from fastffn.cli.commands import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastffn":
            raise
        print(
            f"The fastffn command needs the package '{error.name}': pip install 'fastffn[train]'.",
            file=sys.stderr,
        )
        sys.exit(2)
    run()
