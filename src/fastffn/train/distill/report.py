"""The report of a distillation: held-out loss before and after, and what it took."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastffn.convert.files import write_json, write_text

_HEADERS = ("after", "steps", "tokens", "seconds", "tokens/s", "error of FFNs")
# Measures by their names, and how they are shown.
_MEASURES = {
    "kl": "KL to teacher",
    "student_perplexity": "perplexity",
    "teacher_perplexity": "teacher's",
    "token_error": "error of tokens",
    "sentence_distance": "distance of sentences",
}


def rows(results: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers, and one row for the start and one for each phase that is done."""
    measures = [name for name in _MEASURES if name in results["before"]]
    headers = (*_HEADERS, *(_MEASURES[name] for name in measures))

    def shown(held_out: dict[str, Any]) -> tuple[str, ...]:
        return tuple(f"{held_out[name]:.4g}" for name in ("ffn_error", *measures))

    table = [("conversion", "", "", "", "", *shown(results["before"]))]
    for name, record in results["stages"].items():
        table.append(
            (
                name,
                str(record["steps"]),
                f"{record['tokens']:,}",
                f"{record['own_seconds']:.1f}",
                f"{record['tokens'] / max(record['own_seconds'], 1e-9):,.0f}",
                # Of a phase that goes on there is only the loss.
                *(shown(record["held_out"]) if "held_out" in record else [""] * (1 + len(measures))),
            )
        )
    return headers, table


def with_perplexity(held_out: dict[str, Any]) -> dict[str, Any]:
    """The same measures; nats a token become perplexities too."""
    found = dict(held_out)
    for name in ("student", "teacher"):
        nats = held_out.get(f"{name}_nats")
        if nats is not None:
            found[f"{name}_perplexity"] = math.exp(min(nats, 700.0))
    return found


def summary(results: dict[str, Any]) -> str:
    """What came of it, in a sentence or two."""
    before, last = results["before"], list(results["stages"].values())[-1]
    after = last["held_out"]
    start, end = before["loss"], after["loss"]
    words = (
        f"Held-out distance to the teacher: {start:.4g} before, {end:.4g} after {last['seconds']:.1f} s of training."
    )
    if "teacher_perplexity" in after:
        words += (
            f" Perplexity: teacher {after['teacher_perplexity']:.2f}, student {before['student_perplexity']:.2f} "
            f"before, {after['student_perplexity']:.2f} after."
        )
    return words


def print_report(results: dict[str, Any], output: Path) -> None:
    """The table and the summary, on the screen."""
    headers, table = rows(results)
    print()
    print(tabulate(table, headers=headers, colalign=("left",) + ("right",) * (len(headers) - 1), disable_numparse=True))
    print(f"\n{summary(results)}\n\nModel: {output / results['model']}\nReport: {output / 'report.md'}", flush=True)


def write_report(output: Path, results: dict[str, Any]) -> None:
    """Writes `report.md` and `results.json`."""
    machine = results["machine"]
    end = [
        "## FFNs",
        "",
        "Squared error over the squares of the dense FFN's outputs, on what the teacher's FFNs are given.",
        "",
        _layers(results),
        "",
        "## Machine",
        "",
        f"{machine['processor']} ({machine['cpu_capability']}), {machine['threads']} threads, accelerator "
        f"{machine['accelerator'] or 'none'}; Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f"; commit {machine['commit'] or 'unknown'}.",
        "",
    ]
    _write(output, results, [summary(results), "", f"The model is in `{results['model']}/`."], end)
    # Last: it is what says that the run is complete.
    write_json(output / "results.json", results)


def write_progress(output: Path, facts: dict[str, Any], state: str) -> None:
    """Writes `report.md` of a run that goes on; `state` is a sentence on where it stands."""
    when = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    _write(output, facts, [f"**The run goes on** ({when}). {state}"], [])


def _write(output: Path, results: dict[str, Any], words: list[str], end: list[str]) -> None:
    config = results["config"]
    headers, table = rows(results)
    lines = [
        "# Distillation",
        "",
        f"Student {config['student']}, teacher {config['teacher']}; temperature {config['temperature']:g}, weight of "
        f"the text {config['text_weight']:g}; trained end to end: {config['trainable']}; batch {config['batch']}, peak "
        f"rates {config['layer_learning_rate']:g} and {config['learning_rate']:g}; seed {config['seed']}.",
        f"Text: {config['data']}, {results['text']['train_tokens']:,} tokens to train on, "
        f"{results['text']['validation_tokens']:,} to measure on.",
        "",
        tabulate(
            table,
            headers=headers,
            tablefmt="github",
            colalign=("left",) + ("right",) * (len(headers) - 1),
            disable_numparse=True,
        ),
        "",
        *words,
        "",
        "Seconds are those of training steps, without validations and checkpoints.",
        "",
        *end,
    ]
    write_text(output / "report.md", "\n".join(lines))


def _layers(results: dict[str, Any]) -> str:
    columns = {"conversion": results["before"]} | {name: r["held_out"] for name, r in results["stages"].items()}
    table = [
        (path, *(f"{held_out['ffn_errors'][path]:.4g}" for held_out in columns.values()))
        for path in results["before"]["ffn_errors"]
    ]
    return tabulate(table, headers=("FFN", *columns), tablefmt="github", disable_numparse=True)
