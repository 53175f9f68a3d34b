"""The report of a run: a table, the time-to-loss ratio, a plot, and what they do not say."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastffn.convert.architectures import get_architecture
from fastffn.convert.files import write_figure, write_json, write_text

BASELINES = ("dense", "dense_equal_tokens")
TWO_STAGE = ("warmup", "stage1", "stage2")
CAVEAT = (
    "merging, loading the merged model and re-warming count for the two-stage run. One seed on one machine: a ratio "
    "like this wavers by several per cent from run to run, and says nothing about larger models or longer runs."
)
HEADERS = ("stage", "steps", "tokens", "seconds", "tokens/s", "validation loss")


def final_stage(stages: dict[str, Any]) -> str | None:
    """The stage that ends what is compared with the baselines: `stage2`, or that of a kind that does not merge."""
    names = [name for name in stages if name not in (*BASELINES, "factorise", "merge", "warmup", "stage1")]
    return names[-1] if names else None


def time_to_loss(stages: dict[str, Any], baseline: str) -> dict[str, Any] | None:
    """Seconds that the other run needs to reach a dense run's final validation loss, over the dense run's seconds.

    Counted up to the first validation in the dense stage at or below that loss; merging, loading and re-warming are
    in it, validations and checkpoints are in neither side.

    Returns:
        `ratio` (None: not reached), `target`, `seconds` and `dense_seconds`; None without that baseline, or where there
        is nothing but it.
    """
    final = final_stage(stages)
    if baseline not in stages or final is None:
        return None
    target, dense_seconds = stages[baseline]["validation_loss"], stages[baseline]["seconds"]
    reached = next((point for point in stages[final]["curve"] if point["loss"] <= target), None)
    seconds = reached["seconds"] if reached else None
    return {
        "target": target,
        "seconds": seconds,
        "dense_seconds": dense_seconds,
        "ratio": seconds / dense_seconds if seconds is not None else None,
    }


def headers(results: dict[str, Any]) -> tuple[str, ...]:
    """Of the table. What masked tokens give is no perplexity of text."""
    architecture = get_architecture(results["config"].get("architecture"))
    return (*HEADERS, "exp(loss)" if architecture.masked else "perplexity")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows, one a stage, and one for all of the two-stage run."""
    stages = results["stages"]
    table: list[tuple[str, ...]] = []
    for name, record in stages.items():
        if name in ("factorise", "merge"):
            table.append((name, "", "", f"{record['seconds']:.1f}", "", "", ""))
            continue
        table.append(_row(name, record, record["own_seconds"]))
    if "stage2" in stages:
        parts = [stages[name] for name in TWO_STAGE if name in stages]
        whole = {
            "steps": sum(part["steps"] for part in parts),
            "tokens": sum(part["tokens"] for part in parts),
            "validation_loss": stages["stage2"]["validation_loss"],
        }
        table.append(_row("two-stage in all", whole, stages["stage2"]["seconds"]))
    return table


def _row(name: str, record: dict[str, Any], seconds: float) -> tuple[str, ...]:
    loss = record["validation_loss"]
    return (
        name,
        str(record["steps"]),
        f"{record['tokens']:,}",
        f"{seconds:.1f}",
        f"{record['tokens'] / max(seconds, 1e-9):,.0f}",
        f"{loss:.4f}",
        f"{math.exp(loss):.2f}" if loss < 700 else "inf",
    )


def verdicts(results: dict[str, Any]) -> list[str]:
    """One sentence for each baseline."""
    sentences = []
    final = final_stage(results["stages"])
    names = {"dense": "the dense run", "dense_equal_tokens": "the dense run on as many tokens"}
    for baseline in BASELINES:
        found = results["time_to_loss"].get(baseline)
        if found is None:
            continue
        head = f"Time to the final loss of {names[baseline]} ({found['target']:.4f})"
        if found["ratio"] is None:
            sentences.append(
                f"{head}: not reached; the {'two-stage' if final == 'stage2' else final} run ends at "
                f"{results['stages'][final]['validation_loss']:.4f} after {results['stages'][final]['seconds']:.1f} s "
                f"against {found['dense_seconds']:.1f} s."
            )
        else:
            sentences.append(
                f"{head}: {found['seconds']:.1f} s against {found['dense_seconds']:.1f} s, a ratio of "
                f"{found['ratio']:.2f}."
            )
    return sentences


def print_report(results: dict[str, Any], output: Path) -> None:
    """The table and the verdict, on the screen."""
    print()
    print(tabulate(rows(results), headers=headers(results), colalign=("left",) + ("right",) * 6, disable_numparse=True))
    print()
    for sentence in verdicts(results):
        print(sentence)
    for title, text in _sample(results["sample"]):
        print(f"\n{title}:")
        print("\n".join(_quoted(text)))
    print(f"\nReport: {output / 'report.md'}", flush=True)


def _sample(sample: dict[str, str]) -> list[tuple[str, str]]:
    """What there is to see of the final model: titles and texts."""
    if "filled" in sample:
        return [("Masked, held-out text", sample["masked"]), ("Filled in by the final model", sample["filled"])]
    return [
        ("Prompt, held-out text", sample["prompt"]),
        ("Continued by the final model", sample["continuation"]),
    ]


def write_report(output: Path, results: dict[str, Any]) -> None:
    """Completes `results` and writes `results.json`, `report.md` and `loss_vs_time.png`."""
    results["time_to_loss"] = {
        baseline: found for baseline in BASELINES if (found := time_to_loss(results["stages"], baseline)) is not None
    }
    machine = results["machine"]
    end = [
        "## A sample of the final model",
        "",
        *(line for title, text in _sample(results["sample"]) for line in (f"{title}:", "", *_quoted(text), "")),
        "## Machine",
        "",
        f"{machine['processor']} ({machine['cpu_capability']}), {results['processes']} process(es) of "
        f"{machine['threads']} threads, accelerator {machine['accelerator'] or 'none'}; Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f"; commit {machine['commit'] or 'unknown'}.",
        "",
    ]
    _write(output, results, verdicts(results), end)
    # Last: it is what says that the run is complete.
    write_json(output / "results.json", results)


def write_progress(output: Path, results: dict[str, Any], state: str) -> None:
    """Writes `report.md` and `loss_vs_time.png` of a run that goes on.

    Args:
        output: its directory.
        results: as for `write_report`, with the stages so far; of a stage that goes on, what there is of it.
        state: a sentence on where the run stands.
    """
    when = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    _write(output, results, [f"**The run goes on** ({when}). {state} The last row is what there is of its stage."], [])


def _write(output: Path, results: dict[str, Any], summary: list[str], end: list[str]) -> None:
    config, gain = results["config"], results["gain"]
    architecture = get_architecture(config.get("architecture"))
    plot(results, output / "loss_vs_time.png")
    dense_rate = f"{config['dense_learning_rate'] or config['learning_rate']:g}"
    rates = f"peak learning rate {dense_rate}"
    title = "Two-stage pre-training" if gain is not None else "Pre-training"
    if config["ffn"] != "dense":
        chosen = {name: value for name, value in config.items() if name in results["ffn"] and value is not None}
        rates = (
            f"{'stage 1: ' if gain is not None else ''}{config['ffn']}, "
            + "".join(f"{name} {value}, " for name, value in chosen.items())
            + f"peak learning rate {config['learning_rate']:g}, "
            + (f"factors {config['factor_learning_rate']:g}, " if config.get("factor_learning_rate") else "")
            + (f"dense run {dense_rate}" if config["baseline"] else "")
        ).removesuffix(", ")
    if config.get("dense_layers"):
        rates += f", first {config['dense_layers']} FFNs dense"
    if config.get("ffn_learning_rate"):
        rates += (
            f", {'other ' if config.get('dense_layers') else ''}dense and merged FFNs {config['ffn_learning_rate']:g}"
        )
    start = f" From {config['init_from']}." if config["init_from"] else ""
    waiting = max((record.get("waiting_share", 0.0) for record in results["stages"].values()), default=0.0)
    lines = [
        f"# {title}",
        "",
        f"{architecture.name}, {config['layers']} layers x {config['d_model']}, sequence {config['sequence']}, "
        f"{config['batch'] * config['sequence']:,} tokens a step; {rates}; seed {config['seed']}.{start}",
        f"Text: {config['data']}, {results['text']['characters']:,} characters, "
        f"{results['text']['train_tokens']:,} tokens to train on, "
        f"{results['text']['validation_tokens']:,} to validate."
        + (" Losses are of masked tokens." if architecture.masked else ""),
        "",
        tabulate(
            rows(results),
            headers=headers(results),
            tablefmt="github",
            colalign=("left",) + ("right",) * 6,
            disable_numparse=True,
        ),
        "",
        *summary,
        "",
    ]
    if gain is not None:
        lines += [
            f"A training step, measured at the start ({gain['batch']} sequences): dense {gain['dense_seconds']:.3f} s, "
            f"factorised {gain['factorised_seconds']:.3f} s: {gain['ratio']:.2f} times faster. Arithmetic allows "
            f"{gain['bound']:.2f}; an FFN that cost nothing would give {gain['free_ffn_bound']:.2f}.",
            "",
        ]
    lines += [
        "![Validation loss over training seconds](loss_vs_time.png)",
        "",
        "Seconds are those of training steps, without validations and checkpoints"
        + (f" on either side; {CAVEAT}" if gain is not None else ".")
        + f" Waiting for text took {waiting:.1%} of them, or less.",
        "",
        *end,
    ]
    write_text(output / "report.md", "\n".join(lines))


def _quoted(text: str) -> list[str]:
    """Text as an indented block, in which Markdown means nothing."""
    return [f"    {line}".rstrip() for line in text.splitlines()]


def plot(results: dict[str, Any], path: Path) -> None:
    """Validation loss over training seconds, the switch marked."""
    from matplotlib.figure import Figure

    stages = results["stages"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    labels = {
        "dense": "dense",
        "dense_equal_tokens": "dense, equal tokens",
        "warmup": "two-stage: dense warm-up",
        "stage1": f"two-stage: stage 1 ({results['config']['ffn']})",
        "stage2": "two-stage: stage 2 (dense)",
    }
    for baseline, style in zip(BASELINES, ("-", "--"), strict=True):
        if baseline in stages:
            _line(axes, stages[baseline]["curve"], labels[baseline], "tab:blue", style)
            axes.axhline(stages[baseline]["validation_loss"], color="tab:blue", linewidth=0.7, linestyle=":")
    colors = {"warmup": "tab:gray", "stage1": "tab:orange"}
    for name in stages:
        if name not in BASELINES and "curve" in stages[name]:
            _line(axes, stages[name]["curve"], labels.get(name, name), colors.get(name, "tab:red"), "-")
    if "merge" in stages:
        begin, end = stages["stage1"]["seconds"], stages["stage1"]["seconds"] + stages["merge"]["seconds"]
        axes.axvspan(begin, end, color="tab:green", alpha=0.25)
        axes.axvline(end, color="tab:green", linewidth=1, label="switch (merge)")
    for found in results.get("time_to_loss", {}).values():
        if found["seconds"] is not None:
            axes.plot([found["seconds"]], [found["target"]], "k*", markersize=10)
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("validation loss (nats a token)")
    axes.set_title("Validation loss over training time")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)


def _line(axes: Any, curve: list[dict[str, float]], label: str, color: str, style: str) -> None:
    axes.plot(
        [point["seconds"] for point in curve],
        [point["loss"] for point in curve],
        style,
        marker="o",
        markersize=3,
        color=color,
        label=label,
    )
