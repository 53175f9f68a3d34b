"""`fastffn bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastffn.cli.options import json_option, option_for
from fastffn.cli.run_options import over
from fastffn.data.tokenizer import training_size
from fastffn.errors import ConfigError
from fastffn.registry import get_kind
from fastffn.train.config import PRESETS, PretrainConfig, ffn_option_types, get_preset


@click.group(name="bench")
def command() -> None:
    """Measure speed against the strongest dense baseline, beside the bound that arithmetic gives.

    Example: fastffn bench step --preset demo
    """


@command.command()
@click.option("--preset", help=f"Shape and stage 1: one of {', '.join(PRESETS)}.  [default: as `fastffn pretrain`]")
@click.option("--ffn", help="Kind of FFN beside the dense one.  [default: the preset's]")
@click.option("--batch", type=int, help="Most sequences in a step.  [default: the preset's micro-batch]")
@click.option("--max-seconds", default=5.0, show_default=True, help="Take fewer sequences if a step takes longer.")
@click.option("--rounds", type=int, default=10, show_default=True, help="Timed steps of each kind.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile both models.")
@json_option
def step(
    preset: str | None,
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
    chosen = {name: value for name, value in ({"ffn": ffn} | options).items() if value is not None}
    config = PretrainConfig.from_flat(over(get_preset(preset), chosen, set(chosen)))
    if config.ffn == "dense":
        raise ConfigError("Dense FFNs are what others are compared with; name another kind, such as --ffn low_rank.")
    result = bench_step(
        config.shape(config.vocabulary or training_size(config.tokenizer) or 50257),
        config.ffn_config(),
        batch=batch or config.micro_batch or config.batch,
        rounds=rounds,
        precision=precision,
        compiled=compiled,
        dense_layers=config.dense_layers or 0,
        seconds_a_step=max_seconds,
    )
    click.echo(json.dumps(result) if as_json else format_step(result))


@command.command()
@click.option("--ffn", default="neuron_tree", show_default=True, help="Kind of FFN.")
@click.option("--d-model", type=int, default=768, show_default=True, help="Width of a token.")
@click.option("--tokens", default="1,8,64,512,4096,16384", show_default=True, help="Sizes of the batch.")
@click.option("--passes", type=click.Choice(["forward", "both"]), default="both", show_default=True)
@click.option("--layers", type=int, default=1, show_default=True, help="1: one again and again; more: a stack.")
@click.option("--cold", is_flag=True, help="Empty all caches before each call.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="Of the processor.  [default: what torch takes]")
@click.option("--backend", "backends", multiple=True, help="Measure this one; may be given several times.")
@click.option("--out", is_flag=True, help="Measure the forward pass into memory that is given, too.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Compile the dense FFNs too.  [default: yes]")
@click.option("--rounds", type=int, default=15, show_default=True, help="Timed at least so often, time allowing.")
@click.option("--max-seconds", type=float, default=20.0, show_default=True, help="Timing of one row of contenders.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the result to this JSON file.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a plot to this PNG file.")
@json_option
def layer(
    ffn: str, d_model: int, tokens: str, output: Path | None, plot: Path | None, as_json: bool, **options: Any
) -> None:
    """One FFN, or a stack of them, against the best dense FFN of as many neurons and against published code.

    Example: fastffn bench layer --ffn neuron_tree --depth 11 --tokens 1,64,4096 --output layer.json
    """
    from fastffn.bench.layer import LayerCase, bench_layer
    from fastffn.bench.layer.report import format_layer, plot_layer
    from fastffn.convert.files import make_directory, write_json

    known = ffn_option_types()
    fields = {name: options.pop(name) for name in known}
    chosen = {name: value for name, value in fields.items() if value is not None}
    config = get_kind(ffn).config.from_dict({"d_model": d_model, **chosen}).resolved()
    case = LayerCase(config=config, tokens=_numbers(tokens), **options)
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot is {plot}; the plot is a PNG file, whose name ends in .png.")
    for path in (output, plot):
        if path is not None:
            make_directory(path.absolute().parent)  # before minutes are spent on what cannot be kept
    result = bench_layer(case, lambda line: click.echo(line, err=True))
    if output is not None:
        write_json(output, result)
    if plot is not None:
        plot_layer(result, plot)
    click.echo(json.dumps(result) if as_json else format_layer(result))


def _numbers(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise ConfigError(f"tokens is '{given}'; it must be whole numbers with commas, such as 1,64,4096.") from None


for _command in (step, layer):
    _command.params.extend(
        option_for(name, kind, f"option of the FFN kind {owners}")
        for name, (kind, owners) in ffn_option_types().items()
    )
