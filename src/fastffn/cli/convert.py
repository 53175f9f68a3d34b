"""`fastffn convert`."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastffn.cli.options import json_option, option_for, path_argument
from fastffn.errors import ConfigError, DataError
from fastffn.registry import get_kind
from fastffn.train.config import ffn_option_types

if TYPE_CHECKING:
    from fastffn.convert.report import ConversionReport

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command(name="convert")
@click.argument("source", metavar="MODEL")
@path_argument("target", metavar="OUT")
@click.option("--ffn", required=True, help="Kind of FFN to put in.")
@click.option("--calibration", metavar="TEXT", help="File, folder, glob, data set name or directory, or python-docs.")
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
    ffn: str,
    calibration: str | None,
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

    Example: fastffn convert my_gpt2 my_gpt2_low_rank --ffn low_rank --rank 192 --calibration my_texts/
    """
    from transformers.utils import logging as transformers_logging

    from fastffn.convert.api import check_kind, convert
    from fastffn.convert.convert_command import STORED, convert_checkpoint
    from fastffn.convert.select import layers_and_patterns
    from fastffn.train.disk import full_disk_is_named

    config = get_kind(ffn).config.from_dict({name: value for name, value in options.items() if value is not None})
    check_kind(config)
    if calibration_tokens < 1:
        raise ConfigError(f"--calibration-tokens is {calibration_tokens}; it must be at least 1.")
    if calibration_sequence < 4:
        raise ConfigError(f"--calibration-sequence is {calibration_sequence}; it must be at least 4.")
    transformers_logging.disable_progress_bar()  # for each checkpoint read or written: it would tear our lines apart

    def change(model: Any, directory: Path) -> ConversionReport:
        # What is wrong with the layers is said before the text is read.
        chosen = layers_and_patterns(model, layers, patterns)
        batches = None
        if calibration is not None:
            batches = _batches(model, directory, calibration, calibration_tokens, calibration_sequence)
        report = convert(model, config, calibration=batches, filter=chosen)
        return report.measured(model) if measure else report

    with _progress(), full_disk_is_named(target, kept=f"{target} was not written. Make room, and try again."):
        report = convert_checkpoint(source, target, change, dtype=_DTYPES[dtype] if dtype else STORED)
    if as_json:
        click.echo(json.dumps({"model": source, "output": str(target), **report.to_dict()}))
    else:
        click.echo(_table(report))


def _batches(model: Any, directory: Path, data: str, tokens: int, sequence: int) -> Iterator[Any]:
    """The calibration text as the model reads it, counted on the screen."""
    from fastffn.data.batches import text_batches
    from fastffn.data.text import find_text
    from fastffn.data.tokenizer import load_tokenizer

    source = find_text(data)
    tokenizer = load_tokenizer(str(directory), end_of_text=False)
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"The tokenizer in {directory} has {len(tokenizer)} tokens, the model {model.config.vocab_size}: they do "
            "not belong together."
        )
    # Two positions less than there are: RoBERTa's begin at 2.
    limit = (getattr(model.config, "max_position_embeddings", None) or sequence + 2) - 2
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
