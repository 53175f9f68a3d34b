"""`fastffn bench`."""

from __future__ import annotations

import json
from typing import Any

import click

from fastffn.cli.options import json_option, option_for
from fastffn.data.tokenizer import training_size
from fastffn.errors import ConfigError
from fastffn.train.config import PRESETS, PretrainConfig, ffn_option_types, get_preset


@click.group(name="bench")
def command() -> None:
    """Measure speed against the strongest dense baseline, beside the bound that arithmetic gives.

    Example: fastffn bench step --preset demo
    """


@command.command()
@click.option("--preset", default="demo", show_default=True, help=f"Shape: one of {', '.join(PRESETS)}.")
@click.option("--ffn", help="Kind of FFN beside the dense one.  [default: the preset's]")
@click.option("--batch", type=int, help="Most sequences in a step.  [default: the preset's micro-batch]")
@click.option("--max-seconds", default=5.0, show_default=True, help="Take fewer sequences if a step takes longer.")
@click.option("--rounds", type=int, default=10, show_default=True, help="Timed steps of each kind.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile both models.")
@json_option
def step(
    preset: str,
    ffn: str | None,
    batch: int | None,
    max_seconds: float,
    rounds: int,
    precision: str,
    compiled: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """One training step (forward, backward, optimizer), dense against factorised.

    Example: fastffn bench step --preset seed --rank 192
    """
    from fastffn.bench.step import bench_step, format_step

    for name, value in (("batch", batch), ("rounds", rounds), ("max-seconds", max_seconds)):
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} is {value}; it must be above 0.")
    values = get_preset(preset) | {name: value for name, value in options.items() if value is not None}
    config = PretrainConfig.from_flat(values | ({"ffn": ffn} if ffn else {}))
    result = bench_step(
        config.shape(config.vocabulary or training_size(config.tokenizer) or 50257),
        config.ffn_config(),
        batch=batch or config.micro_batch or config.batch,
        rounds=rounds,
        precision=precision,
        compiled=compiled,
        seconds_a_step=max_seconds,
    )
    click.echo(json.dumps(result) if as_json else format_step(result))


step.params.extend(
    option_for(name, kind, f"option of the FFN kind {owners}") for name, (kind, owners) in ffn_option_types().items()
)
