"""`fastffn merge`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastffn.cli.options import json_option, path_argument


@click.command(name="merge")
@path_argument("source", metavar="IN")
@path_argument("target", metavar="OUT")
@click.option("--check/--no-check", default=True, help="Compare the outputs of both models (loads each in turn).")
@json_option
def command(source: Path, target: Path, check: bool, as_json: bool) -> None:
    """Multiply out the factors of the checkpoint IN; OUT becomes an ordinary dense checkpoint.

    Tensor by tensor, each product in float64 and rounded once. OUT appears whole or not at all.

    Example: fastffn merge runs/demo/stage1 my_gpt2
    """
    from fastffn.convert.merge_command import merge_and_compare
    from fastffn.train.disk import full_disk_is_named

    with full_disk_is_named(target, kept=f"{target} was not written. Make room, and try again."):
        result = merge_and_compare(source, target, check=check)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{target}: {len(result['layers'])} FFNs merged, {result['parameters_before']:,} -> "
        f"{result['parameters_after']:,} parameters."
    )
    if check:
        click.echo(
            f"Logits on random tokens: largest difference {result['largest_difference']:.3g}, largest logit "
            f"{result['largest_logit']:.3g}."
        )
