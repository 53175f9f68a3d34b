"""The downstream table of FastFFN (2022): fine-tuning on WikiText-2 with and without pre-training, and what it lacked.

The original has two rows, no pre-training (average loss 6.657) and two-stage pre-training (4.392): any pre-training
would win against none. Two rows answer what was left open: dense pre-training on as many tokens, and for as many
seconds. Each row is fine-tuned in the same way, with the same seeds, and scored on the test split.
"""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastffn.convert.files import read_json, write_json, write_text
from fastffn.data.text import find_text
from fastffn.errors import ConfigError
from fastffn.evaluate.perplexity import evaluate_perplexity
from fastffn.measure.machine import describe_machine
from fastffn.settings import data_dir
from fastffn.train.config import PretrainConfig
from fastffn.train.pretrain import pretrain
from fastffn.train.processes import on_main, say
from fastffn.train.report import TWO_STAGE

# What the original reports, at its own size: not to be compared with numbers from here.
PUBLISHED = {"none": 6.657, "two-stage": 4.392}
ROWS = {
    "none": "no pre-training",
    "two-stage": "two-stage (FastFFN)",
    "dense, same tokens": "dense, as many tokens",
    "dense, same seconds": "dense, as many seconds",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Fine-tuning on WikiText-2, the same for every row.

    Attributes:
        steps: optimizer steps.
        learning_rate: its peak.
        evaluate_every: steps between validations on the validation split.
    """

    steps: int = 300
    learning_rate: float = 5e-4
    evaluate_every: int = 50


def wikitext_2() -> dict[str, dict[str, Any]]:
    """Where WikiText-2 is: for `train`, `validation` and `test` the arguments `data` and `split` of `find_text`.

    The files of FASTFFN_DATA_DIR if they are there, else the data set by its name.
    """
    folder = data_dir()
    if folder is not None and (folder / "wikitext-2").is_dir():
        names = {"train": "train", "validation": "valid", "test": "test"}
        return {
            split: {"data": str(folder / "wikitext-2" / f"{name}.txt.xz"), "split": None}
            for split, name in names.items()
        }
    return {split: {"data": "wikitext-2", "split": split} for split in ("train", "validation", "test")}


def wikitext2_table(
    config: PretrainConfig, output: Path, *, seeds: int = 3, tuning: Tuning | None = None
) -> dict[str, Any]:
    """Makes the table; the same call goes on with what was interrupted.

    Args:
        config: the two-stage pre-training, its dense baseline included; its seed is the first one.
        output: directory for all runs, `table.md` and `table.json`.
        seeds: number of seeds.
        tuning: how to fine-tune.

    Returns:
        What is in `table.json`: for each row the test loss in nats a token of every seed, and the seconds before.

    Raises:
        ConfigError: `config` has no two stages, no baseline, predicts masked tokens, or there are no seeds.
    """
    if config.masked:
        raise ConfigError(f"The table is of models that predict the next token, not of {config.architecture}.")
    if not config.two_stage or not config.baseline or config.restart:
        raise ConfigError("The table needs a two-stage run in one schedule with its dense baseline beside it.")
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; it must be at least 1.")
    tuning = tuning or Tuning()
    text = wikitext_2()
    # What is wrong with the fine-tuning shall not show itself after hours of pre-training.
    for start in (None, output):
        _tuned(config, tuning, config.seed, start, output, text)
    on_main(lambda: [find_text(where["data"], split=where["split"]) for where in text.values()] and None)
    rows: dict[str, Any] = {name: {"loss": [], "word_perplexity": [], "seconds": [], "steps": []} for name in ROWS}
    for seed in range(config.seed, config.seed + seeds):
        base = output / f"seed-{seed}"
        for name, (start, seconds, steps) in _starts(dataclasses.replace(config, seed=seed), base).items():
            say(f"\nseed {seed}, {ROWS[name]}: fine-tuning on WikiText-2")
            run = base / ("tuned-" + name.replace(", ", "-").replace(" ", "-"))
            pretrain(_tuned(config, tuning, seed, start, base, text), run)
            found = on_main(partial(_score, run, text["test"]))
            rows[name]["loss"].append(found["nll"] / found["tokens"])
            rows[name]["word_perplexity"].append(found["word_perplexity"])
            rows[name]["seconds"].append(seconds)
            rows[name]["steps"].append(steps)
    result = {
        "config": config.to_flat(),
        "tuning": dataclasses.asdict(tuning),
        "seeds": seeds,
        "rows": rows,
        "published": PUBLISHED,
        "machine": describe_machine(),
    }
    on_main(lambda: _write(output, result))
    return result


def _starts(config: PretrainConfig, base: Path) -> dict[str, tuple[Path | None, float, int]]:
    """Pre-trains; for each row the checkpoint, and the seconds and steps that made it."""
    stages = pretrain(config, base / "pretrained")["stages"]
    dense, seconds = stages["dense"], stages["stage2"]["seconds"]
    # The dense run that the two-stage run's time allows, with a schedule that ends there.
    steps = max(1, int(seconds / (dense["own_seconds"] / dense["steps"])))
    fewer = dataclasses.replace(
        config, ffn="dense", ffn_options={}, factor_learning_rate=None, steps=steps, epochs=None
    )
    shorter = pretrain(fewer, base / "dense-same-seconds")["stages"]["dense"]
    return {
        "none": (None, 0.0, 0),
        "two-stage": (
            base / "pretrained" / "stage2",
            seconds,
            sum(s["steps"] for n, s in stages.items() if n in TWO_STAGE),
        ),
        "dense, same tokens": (base / "pretrained" / "dense", dense["own_seconds"], dense["steps"]),
        "dense, same seconds": (base / "dense-same-seconds" / "dense", shorter["own_seconds"], steps),
    }


def _tuned(
    config: PretrainConfig, tuning: Tuning, seed: int, start: Path | None, base: Path, text: dict[str, dict[str, Any]]
) -> PretrainConfig:
    return dataclasses.replace(
        config,
        ffn="dense",
        ffn_options={},
        seed=seed,
        data=text["train"]["data"],
        validation=text["validation"]["data"],
        text_column="text",
        document_separator=None,
        tokenizer=str(base / "pretrained" / "tokenizer"),
        init_from=None if start is None else str(start),
        initializer_range=config.initializer_range if start is None else None,
        steps=tuning.steps,
        epochs=None,
        learning_rate=tuning.learning_rate,
        dense_learning_rate=None,
        factor_learning_rate=None,
        ffn_learning_rate=None,
        warmup_steps=min(config.warmup_steps, tuning.steps // 10),
        evaluate_every=tuning.evaluate_every,
        checkpoint_every=tuning.steps,
    )


def _score(run: Path, test: dict[str, Any]) -> dict[str, Any]:
    """Loss on the test split, kept beside the run: it takes a while."""
    kept = run / "dense" / "wikitext-2-test.json"
    if not kept.is_file():
        write_json(kept, evaluate_perplexity(run / "dense", test["data"], split=test["split"]))
    return read_json(kept)


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown: mean and spread over the seeds."""
    lines = []
    for name, title in ROWS.items():
        row = result["rows"][name]
        spread = f" +- {statistics.stdev(row['loss']):.3f}" if len(row["loss"]) > 1 else ""
        published = result["published"].get(name)
        lines.append(
            (
                title,
                f"{statistics.mean(row['steps']):,.0f}",
                f"{statistics.mean(row['seconds']):,.0f}",
                f"{statistics.mean(row['loss']):.3f}{spread}",
                f"{statistics.mean(row['word_perplexity']):,.0f}",
                "" if published is None else f"{published}",
            )
        )
    headers = (
        "pre-training",
        "steps",
        "seconds",
        "WikiText-2 test loss",
        "word perplexity",
        "original's loss (its own size)",
    )
    return tabulate(
        lines, headers=headers, tablefmt="github", colalign=("left",) + ("right",) * 5, disable_numparse=True
    )


def _write(output: Path, result: dict[str, Any]) -> None:
    config, tuning, machine = result["config"], result["tuning"], result["machine"]
    lines = [
        "# WikiText-2 after pre-training",
        "",
        table(result),
        "",
        f"{config['layers']} layers x {config['d_model']}, sequence {config['sequence']}, "
        f"{config['batch'] * config['sequence']:,} tokens a step, pre-trained on {config['data']}; stage 1: "
        f"{config['ffn']}. Fine-tuned for {tuning['steps']} steps at a peak learning rate of "
        f"{tuning['learning_rate']:g}. Loss in nats a token of the run's own tokenizer; {result['seeds']} seed(s), "
        "mean and standard deviation. The original's losses are of another size, tokenizer and length; only their "
        "order compares.",
        "",
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['versions']['torch']}; commit "
        f"{machine['commit'] or 'unknown'}.",
        "",
    ]
    write_text(output / "table.md", "\n".join(lines))
    write_json(output / "table.json", result)
