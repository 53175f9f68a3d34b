"""`fastffn convert`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastffn.cli.options import json_option, option_for, path_argument, text_options
from fastffn.errors import ConfigError, DataError
from fastffn.registry import get_kind
from fastffn.train.config import ffn_option_types

if TYPE_CHECKING:
    from fastffn.convert.budget.quality import Budget
    from fastffn.convert.budget.report import BudgetReport
    from fastffn.convert.report import ConversionReport

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command(name="convert")
@click.argument("source", metavar="MODEL")
@path_argument("target", metavar="OUT")
@click.option("--ffn", help="Kind of FFN to put in; within a budget, kinds to try: a,b.  [default there: all]")
@click.option("--max-loss-increase", metavar="PART", help="Budget: relative rise of the held-out loss, such as 2%.")
@click.option("--min-similarity", type=float, help="Budget for encoders: mean cosine with the dense model's output.")
@click.option("--speed-at", type=int, metavar="TOKENS", help="Within a budget: tokens in a call.  [default: 1]")
@click.option("--held-out-tokens", type=int, default=4096, show_default=True, help="To measure the budget on.")
@click.option("--force", is_flag=True, help="Write the least harmful change if none keeps the budget.")
@click.option("--calibration", metavar="TEXT", help="File, folder, glob, data set name or directory, or python-docs.")
@text_options
@click.option("--calibration-tokens", type=int, default=16384, show_default=True, help="How much of it to read.")
@click.option(
    "--calibration-sequence", type=int, default=512, show_default=True, help="Tokens in a sequence of it at most."
)
@click.option("--layers", help="Numbers of the FFNs to replace, from 0, such as 0-5,11.  [default: all]")
@click.option(
    "--filter", "patterns", multiple=True, metavar="GLOB", help="Replace FFNs whose path matches; may repeat."
)
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Of the weights.  [default: the checkpoint's]")
@click.option("--measure", is_flag=True, help="Time each layer before and after, on this machine.")
@json_option
def command(
    source: str,
    target: Path,
    ffn: str | None,
    max_loss_increase: str | None,
    min_similarity: float | None,
    speed_at: int | None,
    held_out_tokens: int,
    force: bool,
    calibration: str | None,
    text_column: str,
    document_separator: str,
    calibration_tokens: int,
    calibration_sequence: int,
    layers: str | None,
    patterns: tuple[str, ...],
    dtype: str | None,
    measure: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Replace the FFNs of the model MODEL; OUT becomes a checkpoint with FFNs of another kind.

    MODEL is a directory, or a name that transformers can load. With --calibration each FFN is approximated where
    the text takes it, without everywhere alike. OUT appears whole or not at all; it loads after `import fastffn.hf`.

    With --max-loss-increase or --min-similarity the kind and size of each FFN are searched for: the fastest on this
    machine that keep the budget on text that follows the calibration's. FFNs that do not pay stay dense.

    Example: fastffn convert my_gpt2 my_gpt2_low_rank --ffn low_rank --rank 192 --calibration my_texts/

    Example: fastffn convert my_gpt2 my_faster_gpt2 --max-loss-increase 2% --calibration my_texts/
    """
    from transformers.utils import logging as transformers_logging

    from fastffn.convert.api import check_kind, convert
    from fastffn.convert.budget.search import convert_within
    from fastffn.convert.convert_command import STORED, convert_checkpoint
    from fastffn.convert.select import layers_and_patterns
    from fastffn.train.disk import full_disk_is_named

    fields = {name: value for name, value in options.items() if value is not None}
    budget = _budget(max_loss_increase, min_similarity)
    for name, tokens in (("calibration", calibration_tokens), ("held-out", held_out_tokens)):
        if tokens < 1:
            raise ConfigError(f"--{name}-tokens is {tokens}; it must be at least 1.")
    if calibration_sequence < 4:
        raise ConfigError(f"--calibration-sequence is {calibration_sequence}; it must be at least 4.")
    transformers_logging.disable_progress_bar()  # for each checkpoint read or written: it would tear our lines apart

    read = partial(_batches, column=text_column, separator=document_separator, sequence=calibration_sequence)
    change: Callable[[Any, Path], Any]
    if budget is None:
        if ffn is None:
            raise ConfigError("Name a kind with --ffn, or a budget with --max-loss-increase or --min-similarity.")
        if force or speed_at is not None:
            raise ConfigError("--force and --speed-at belong to a budget: --max-loss-increase or --min-similarity.")
        config = get_kind(ffn).config.from_dict(fields)
        check_kind(config)

        def change(model: Any, directory: Path) -> ConversionReport:
            # What is wrong with the layers is said before the text is read.
            chosen = layers_and_patterns(model, layers, patterns)
            batches = None
            if calibration is not None:
                batches = read(model, directory, calibration, calibration_tokens)
            report = convert(model, config, calibration=batches, filter=chosen)
            return report.measured(model) if measure else report

    else:
        if fields:
            raise ConfigError(f"Within a budget sizes are searched for; leave out --{min(fields).replace('_', '-')}.")
        if calibration is None:
            raise ConfigError("A budget needs text to measure on; give some with --calibration.")
        tried = [get_kind(name).name for name in ffn.split(",")] if ffn else None

        def change(model: Any, directory: Path) -> BudgetReport:
            chosen = layers_and_patterns(model, layers, patterns)
            count = calibration_tokens + held_out_tokens
            batches = list(read(model, directory, calibration, count))
            shown, held_out = _parted(batches, calibration_tokens)
            report = convert_within(
                model,
                budget,
                calibration=shown,
                held_out=held_out,
                kinds_to_try=tried,
                tokens=1 if speed_at is None else speed_at,
                filter=chosen,
                force=force,
            )
            if not measure:
                return report
            return dataclasses.replace(report, conversion=report.conversion.measured(model))

    with _progress(), full_disk_is_named(target, kept=f"{target} was not written. Make room, and try again."):
        report: Any = convert_checkpoint(source, target, change, dtype=_DTYPES[dtype] if dtype else STORED)
    if as_json:
        click.echo(json.dumps({"model": source, "output": str(target), **report.to_dict()}))
    elif budget is None:
        click.echo(_table(report))
    else:
        click.echo(_table(report.conversion))
        click.echo(_curve(report))


def _budget(max_loss_increase: str | None, min_similarity: float | None) -> Budget | None:
    from fastffn.convert.budget.quality import Budget

    if max_loss_increase is None and min_similarity is None:
        return None
    part = None
    if max_loss_increase is not None:
        number = max_loss_increase.removesuffix("%")
        try:
            part = float(number) / (100 if number != max_loss_increase else 1)
        except ValueError:
            raise ConfigError(f"--max-loss-increase is '{max_loss_increase}'; give 2% or 0.02.") from None
        if part >= 1 and number == max_loss_increase:
            raise ConfigError(
                f"--max-loss-increase is {number}, which would be {100 * part:.4g} %; give {number}% or {part / 100:g}."
            )
    return Budget(max_loss_increase=part, min_similarity=min_similarity)


def _parted(batches: list[dict[str, Any]], calibration_tokens: int) -> tuple[list[Any], list[Any]]:
    """The sequences for calibration, and those after them to measure on."""
    shown: list[Any] = []
    held_out: list[Any] = []
    read = 0
    for batch in batches:
        counts = batch["attention_mask"].sum(1).tolist()
        before = [read + sum(counts[:row]) for row in range(len(counts))]
        first = sum(count < calibration_tokens for count in before)
        for rows, part in ((slice(first), shown), (slice(first, None), held_out)):
            if len(counts[rows]):
                part.append({name: value[rows] for name, value in batch.items()})
        read += sum(counts)
    if not held_out:
        raise DataError(
            f"The text has {read:,} tokens: nothing is left to measure on after {calibration_tokens:,} for "
            "calibration. Give more text, or fewer --calibration-tokens."
        )
    return shown, held_out


def _batches(
    model: Any, directory: Path, data: str, tokens: int, *, column: str, separator: str, sequence: int
) -> Iterator[Any]:
    """The calibration text as the model reads it, counted on the screen."""
    from fastffn.convert.loading import longest_sequence
    from fastffn.data.batches import text_batches
    from fastffn.data.text import find_text
    from fastffn.data.tokenizer import load_tokenizer

    source = find_text(data, column=column, separator=separator)
    tokenizer = load_tokenizer(str(directory), end_of_text=False)
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"The tokenizer in {directory} has {len(tokenizer)} tokens, the model {model.config.vocab_size}: they do "
            "not belong together."
        )
    limit = longest_sequence(model.config) or sequence
    batches = text_batches(source, tokenizer, sequence=min(sequence, limit), tokens=tokens)
    return _counted(batches, tokens)


def _counted(batches: Iterator[dict[str, Any]], tokens: int) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    read = 0
    with tqdm(total=tokens, unit="token", desc="calibration", disable=not sys.stderr.isatty()) as bar:
        for batch in batches:
            yield batch
            count = int(batch["attention_mask"].sum())
            read += count
            bar.update(count)
    logging.getLogger("fastffn.convert").info("calibration: %s tokens read", f"{read:,}")


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """What conversion tells of its progress, on the standard error."""
    logger = logging.getLogger("fastffn.convert")
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _curve(report: BudgetReport) -> str:
    from tabulate import tabulate

    rows = [
        [
            point.plan.changed,
            f"{report.speed(point):.2f} x",
            f"{point.quality.value:.4f}",
            f"{point.quality.damage:.5f}",
            "taken" if point is report.chosen else "",
        ]
        for point in report.curve
    ]
    headers = ["FFNs changed", "speed of all FFNs", "quality", "damage", ""]
    return f"\n{report.budget}, on {report.tokens:,} held-out tokens:\n" + tabulate(
        rows, headers=headers, disable_numparse=True
    )


def _table(report: ConversionReport) -> str:
    from tabulate import tabulate

    def row(name: str, kind: str, before: Any, after: Any, speeds: Any = ()) -> list[str]:
        changes = [f"{old:,} -> {new:,}" for old, new in zip(before, after, strict=True)]
        return [name, kind, *changes, *[f"{speed.ratio:.2f} x" for speed in speeds]]

    tokens = next(([speed.tokens for speed in layer.speeds] for layer in report.layers if layer.speeds), [])
    rows = [row(layer.path, layer.kind, layer.before, layer.after, layer.speeds) for layer in report.layers]
    headers = ["FFN", "kind", "parameters", "active a token", "FLOPs a token"]
    headers += [f"speed, {count} token{'s' if count > 1 else ''}" for count in tokens]
    return tabulate([*rows, row("all", "", *report.totals())], headers=headers, disable_numparse=True)


command.params.extend(
    option_for(name, kind, f"option of the FFN kind {owners}") for name, (kind, owners) in ffn_option_types().items()
)
