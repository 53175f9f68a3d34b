"""The tables and the plot of time-to-loss."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastffn.convert.architectures import get_architecture
from fastffn.convert.files import write_figure

HEADERS = {"flops": "FLOPs", "seconds": "seconds"}


def screen_table(result: dict[str, Any]) -> str:
    """The recipes on one seed."""
    rates = [f"{rate:g}" for rate in result["rates"]]
    widths = _has_widths(result)
    lines = []
    for name, row in result["screen"].items():
        rate = f"{row['rate']:g}"
        losses = [f"{row['losses'][r]:.4f}" for r in rates]
        shown = [f"**{loss}**" if r == rate else loss for r, loss in zip(rates, losses, strict=True)]
        edge = " (edge)" if row["at_edge"] else ""
        ratios = [row, row["any_width"]] if widths else [row]
        lines.append(
            [
                name,
                row["note"],
                *shown,
                rate + edge,
                f"{row['flops_share']:.3f}",
                *(f"{ratio['beyond']} {ratio['ratio']:.3f}" for ratio in ratios),
            ]
        )
    headers = ["recipe", "", *rates, "best rate", "FLOPs", "ratio", *(["any width"] if widths else [])]
    return _table(lines, headers)


def confirmed_table(result: dict[str, Any]) -> str:
    """Recipes of several lengths against dense training of full length, over the paired seeds."""
    lines = []
    confirmed = result["confirmed"]
    dense = confirmed["dense"]
    lines.append([result["dense"], "1", "1", "1", _spread(dense["loss"]), "", "", _words(dense["word_perplexity"])])
    for name, row in confirmed["recipes"].items():
        for part in row["lengths"]:
            test = part["difference"]
            seconds = "" if part["seconds_ratio"] is None else f"{part['seconds_ratio']:.3f}"
            lines.append(
                [
                    name,
                    f"{part['length']:g}",
                    f"{part['flops_ratio']:.3f}",
                    seconds,
                    _spread(part["loss"]),
                    f"{test['mean']:+.4f}" + ("" if test["sd"] is None else f" +- {test['sd']:.4f}"),
                    "" if test["p"] is None else f"{test['p']:.2g}",
                    _words(part["word_perplexity"]),
                ]
            )
    headers = [
        "recipe",
        "length",
        "FLOPs",
        "seconds",
        "validation loss",
        "minus dense, paired",
        "p",
        "WikiText-2 word perplexity",
    ]
    return _table(lines, headers)


def _words(found: list[float | None]) -> str:
    """The mean of word perplexities; models of masked tokens have none."""
    known = [value for value in found if value is not None]
    return f"{statistics.mean(known):,.1f}" if known else ""


def verdicts(result: dict[str, Any]) -> list[str]:
    """One sentence for each confirmed recipe and currency."""
    sentences = []
    seeds = len(result["confirmed"]["seeds"])
    for name, row in result["confirmed"]["recipes"].items():
        for currency, noun in HEADERS.items():
            found = row[currency]
            if found is None:
                continue
            reached = sum(value is not None for value in found["by_run"])
            if reached < seeds:
                sentences.append(f"{name}, {noun}: reaches the dense loss on {reached} of {seeds} seeds; no ratio.")
                continue
            parts = [
                f"{words} {found[f'{kind}_mean']:.3f}"
                + ("" if found[f"{kind}_sd"] is None else f" +- {found[f'{kind}_sd']:.3f}")
                for kind, words in (("by_run", "cheapest complete run"), ("between", "in between two runs"))
            ]
            sentences.append(f"{name}, {noun} to the dense loss over dense: " + ", ".join(parts) + ".")
    return sentences


def report(result: dict[str, Any]) -> str:
    """The tables with what they were made on."""
    config, machine, step = result["config"], result["machine"], result["step"]
    lines = [
        "# Time to loss",
        "",
        f"One seed ({result['sweep_seed']}): final validation losses at each peak learning rate; FLOPs of a run over "
        f"those of dense training of full length; ratio: the run's FLOPs over those at which {result['dense']}, "
        "trained for shorter or longer, ends at the same loss (`<`, `>`: at most, at least; that loss is beyond all "
        "dense runs)."
        + (
            " Any width: the same against the cheapest of that and the models that stay smaller, trained for shorter "
            "or longer; above 1 in the dense row, the model is too large for this budget."
            if _has_widths(result)
            else ""
        ),
        "",
        screen_table(result),
        "",
    ]
    if result["confirmed"] is not None:
        seeds = ", ".join(map(str, result["confirmed"]["seeds"]))
        lines += [
            f"Other seeds ({seeds}), each recipe at its best rate: mean and standard deviation; p: paired t test, "
            "two-sided. Length, FLOPs and seconds are over those of dense training.",
            "",
            confirmed_table(result),
            "",
            *[line for sentence in verdicts(result) for line in (sentence, "")],
        ]
    lines += [
        f"{get_architecture(config['architecture']).name} of {config['layers']} layers x {config['d_model']}, "
        f"sequence {config['sequence']}, "
        f"{config['batch'] * config['sequence']:,} tokens a step, full length {config['steps']} steps on "
        f"{config['data']}.",
    ]
    if step is not None:
        dense = step["steps"]["dense"]["median"]
        timed = step["machine"]
        parts = (f"{name} {timing['median'] / dense:.3f}" for name, timing in step["steps"].items() if name != "dense")
        lines += [
            f"A dense step of {step['sequences']} sequences: {dense:.4f} s; the others', over it: {', '.join(parts)} "
            f"({timed['processor']}, {timed['threads']} threads).",
        ]
    lines += [
        "",
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['versions']['torch']}; commit "
        f"{machine['commit'] or 'unknown'}.",
        "",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Final validation loss over FLOPs: the dense frontiers and the recipes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in result["screen"].items():
        if "frontier" in row and name != result["dense"]:
            axes.plot(*zip(*row["frontier"], strict=True), "o--", markersize=3, label=f"{name}, complete runs")
        elif "frontier" in row:
            flops, losses = zip(*row["frontier"], strict=True)
            axes.plot(flops, losses, "o-", color="tab:blue", label=f"{name}, complete runs")
            axes.plot(*zip(*row["curve"], strict=True), ":", color="tab:blue", linewidth=0.8)
            # Around the frontier, or around the one run that it has.
            low, high = min(losses), max(losses)
            height = high - low or 0.1
            axes.set_ylim(low - 0.4 * height, high + 0.6 * height)
        else:
            (line,) = axes.plot(*zip(*row["curve"], strict=True), ":", linewidth=0.8)
            axes.plot([row["flops"]], [row["loss"]], "s", color=line.get_color(), markersize=4, label=name)
    axes.set_xlabel("FLOPs of training")
    axes.set_ylabel("validation loss (nats a token)")
    axes.set_title("Where complete runs end")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    write_figure(path, figure)


def _has_widths(result: dict[str, Any]) -> bool:
    """Whether there were smaller models to compare with."""
    return any("any_width" in row for row in result["screen"].values())


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" + (f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _table(lines: list[list[str]], headers: list[str]) -> str:
    alignment = ("left", "left") + ("right",) * (len(headers) - 2)
    return tabulate(lines, headers=headers, tablefmt="github", colalign=alignment, disable_numparse=True)
