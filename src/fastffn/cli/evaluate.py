"""`fastffn evaluate`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click

from fastffn.cli.options import json_option, path_argument, text_options


@click.group(name="evaluate")
def command() -> None:
    """Measure a model's quality.

    Example: fastffn evaluate perplexity runs/demo/stage2 --data my_text.txt
    """


@command.command()
@path_argument("model")
@click.option("--data", required=True, help="File, folder, glob, data set name or directory, or python-docs.")
@click.option("--split", help="Split of a data set.  [default: train]")
@text_options
@click.option("--tokenizer", help="Directory or hub name.  [default: the model's own]")
@click.option("--context", type=int, help="Tokens that the model sees at once.  [default: as many as it can]")
@click.option("--stride", type=int, help="Tokens between windows, each scored once.  [default: half the context]")
@click.option("--batch", type=int, help="Windows at a time.  [default: 8, fewer where they are long]")
@json_option
def perplexity(
    model: Path,
    data: str,
    split: str | None,
    text_column: str,
    document_separator: str,
    tokenizer: str | None,
    context: int | None,
    stride: int | None,
    batch: int | None,
    as_json: bool,
) -> None:
    """Perplexity of the language model MODEL on a text: per token, per word, and bits per byte.

    Every token is scored once, with at least context - stride tokens before it where the text has them.

    Example: fastffn evaluate perplexity runs/demo/stage2 --data my_text.txt --stride 128
    """
    from fastffn.evaluate.perplexity import evaluate_perplexity

    result = evaluate_perplexity(
        model,
        data,
        split=split,
        column=text_column,
        separator=document_separator,
        tokenizer=tokenizer,
        context=context,
        stride=stride,
        batch=batch,
    )
    if as_json:
        click.echo(json.dumps(result))
        return
    words = result["word_perplexity"]
    click.echo(
        f"{result['tokens']:,} tokens, {result['words']:,} words, {result['bytes']:,} bytes; context "
        f"{result['context']}, stride {result['stride']}\n"
        f"perplexity per token  {result['token_perplexity']:.3f}\n"
        f"perplexity per word   {'none' if words is None else f'{words:.3f}'}\n"
        f"bits per byte         {result['bits_per_byte']:.4f}"
    )


@command.command()
@path_argument("model")
@click.option("--tasks", required=True, help="Names of tasks or groups with commas, such as hellaswag,arc_easy.")
@click.option("--include-path", type=click.Path(path_type=Path), help="Folder of YAML files that define more tasks.")
@click.option("--limit", type=int, help="Examples of each task at most.  [default: all]")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Requests at a time.")
@json_option
def harness(
    model: Path, tasks: str, include_path: Path | None, limit: int | None, batch_size: int, as_json: bool
) -> None:
    """Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on the causal language model MODEL.

    Needs `pip install 'fastffn[eval]'`. Most tasks fetch their data from a hub.

    Example: fastffn evaluate harness runs/recovered/student --tasks hellaswag,arc_easy --limit 200
    """
    from tabulate import tabulate

    from fastffn.evaluate.harness import evaluate_harness

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    # With --json the standard output is JSON and nothing else.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = evaluate_harness(model, names, include_path=include_path, limit=limit, batch=batch_size)
    if as_json:
        click.echo(json.dumps(result))
        return
    rows = [
        (task, metric, f"{found['value']:.4f}", "" if found["stderr"] is None else f"{found['stderr']:.4f}")
        for task, metrics in result["results"].items()
        for metric, found in metrics.items()
    ]
    click.echo(
        tabulate(rows, ("task", "metric", "value", "standard error"), disable_numparse=True, stralign="right")
        + f"\n\nlm-eval {result['lm_eval']}, {'all' if limit is None else f'at most {limit}'} examples of each task"
    )
