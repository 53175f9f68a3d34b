"""`fastffn info`."""

from __future__ import annotations

import json
import os

import click

from fastffn.cli.options import json_option


@click.command(name="info")
@json_option
def command(as_json: bool) -> None:
    """Versions, devices, kinds of FFN, operations with their backends, and environment variables.

    Example: fastffn info --json
    """
    from fastffn.measure.machine import describe_machine
    from fastffn.ops import OPS
    from fastffn.registry import kinds
    from fastffn.settings import ENVIRONMENT

    machine = describe_machine()
    known = {name: (kind.module.__doc__ or "").strip().splitlines()[0] for name, kind in kinds().items()}
    # Of each backend, why it does not run the example of its operation; None if it would.
    operations = {name: {"example": str(op.example), "backends": op.verdicts()} for name, op in OPS.items()}
    settings = {name: os.environ.get(name) for name in ENVIRONMENT}
    if as_json:
        click.echo(json.dumps({"machine": machine, "kinds": known, "operations": operations, "environment": settings}))
        return
    for name, value in machine.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version or 'not installed'}" for key, version in value.items())
        click.echo(f"{name:15} {value}")
    click.echo("\nKinds of FFN")
    for name, meaning in known.items():
        click.echo(f"  {name:12} {meaning}")
    click.echo("\nOperations and their backends, in order of preference")
    for name, op in OPS.items():
        click.echo(f"  {name}, for example {op.example}")
        for backend, reason in op.verdicts().items():
            click.echo(f"    {backend:14} {reason or 'would run'}")
    click.echo("\nEnvironment variables")
    for name, meaning in ENVIRONMENT.items():
        click.echo(f"  {name}={settings[name] or ''}  {meaning}")
