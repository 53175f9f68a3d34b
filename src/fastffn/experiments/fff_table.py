"""Table 1 of the FFF paper (arXiv 2308.14711) in our hands, with the rows it lacks: equal active width, and repairs.

The paper compares leaf trees with a dense FFN of their training width. Beside that stand here dense FFNs of the
inference width (one leaf) and of the active width (a leaf and the nodes on the way to it), mixtures of experts, and the
first leaf width's tree with each known repair.
"""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastffn.convert.files import write_json, write_text
from fastffn.data.images import Images, read_images
from fastffn.errors import ConfigError
from fastffn.experiments.cells import opened, together
from fastffn.experiments.classify import Recipe, train_classifier
from fastffn.experiments.fff_cells import PUBLISHED, Row, published_rows, repaired_rows
from fastffn.experiments.inference_time import time_inference
from fastffn.measure.machine import describe_machine
from fastffn.train.processes import say


def fff_table(
    output: Path,
    *,
    images: tuple[str, ...] = ("digits",),
    seeds: int = 3,
    width: int = 128,
    leaf_widths: tuple[int, ...] = (8, 4, 2, 1),
    epochs: int | None = None,
    repairs: int | None = None,
    timing: bool = True,
) -> dict[str, Any]:
    """Makes the table; the same call goes on with what was interrupted.

    Args:
        output: directory for the cells, `table.md` and `result.json`.
        images: data sets; see `fastffn.data.images.read_images`.
        seeds: number of seeds.
        width: training width.
        leaf_widths: one leaf tree each; the first is the one that is repaired.
        epochs: of training; None: `EPOCHS` of the data set.
        repairs: number of seeds of the repaired trees; 0: none, None: as many as of the others.
        timing: whether to time inference, where that has not been done yet.

    Returns:
        What is in `result.json`: for each data set and row the accuracies of every seed, and seconds.

    Raises:
        ConfigError: something is out of range.
        DataError: a data set is missing.
        OutputError: `output` holds something else.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; it must be at least 1.")
    if not leaf_widths:
        raise ConfigError("leaf_widths is empty; give at least one, such as 8.")
    # What is wrong with one data set shall not show itself after the other has been trained on.
    sets = {name: read_images(name) for name in images}
    repairs = seeds if repairs is None else repairs
    if not 0 <= repairs <= seeds:
        raise ConfigError(f"repairs is {repairs}; it must be from 0 to the number of seeds, {seeds}.")
    rows: dict[str, list[tuple[Row, int]]] = {}
    for name, found in sets.items():
        recipe = Recipe(epochs=EPOCHS[name] if epochs is None else epochs)
        kept = [(row, seeds) for row in published_rows(found, recipe, width=width, leaf_widths=leaf_widths)]
        repaired = repaired_rows(found, recipe, width=width, leaf=leaf_widths[0]) if repairs else []
        rows[name] = kept + [(row, repairs) for row in repaired]
    result: dict[str, Any] = {"width": width, "leaf_widths": list(leaf_widths), "images": {}}
    with opened(output, {"experiment": "fff-table-1", "width": width, "epochs": epochs}) as cells:
        for name in sets:
            facts = {row.name: _facts(row) for row, _ in rows[name]}
            result["images"][name] = {"rows": facts, "published": PUBLISHED.get(name, {}) if width == 128 else {}}
        # One seed of everything, then the next: what is interrupted is a table with fewer seeds.
        for seed in range(seeds):
            for name, found in sets.items():
                for row in (row for row, count in rows[name] if seed < count):
                    cell = cells.get(f"{name}-{row.name}-seed-{seed}", partial(_train, row, found, seed))
                    result["images"][name]["rows"][row.name]["seeds"].append(cell)
        for name, found in sets.items() if timing else ():
            # A repair changes the training, and not what evaluation costs.
            timed = published_rows(found, Recipe(), width=width, leaf_widths=leaf_widths)
            configs = {row.name: row.config for row in timed}
            make = partial(time_inference, configs, found.test, baseline=f"dense-{width}")
            result["images"][name]["inference"] = cells.get(together(f"{name}-inference", configs), make)
        result["machine"] = describe_machine()
        write_json(output / "result.json", result)
        write_text(output / "table.md", report(result))
    return result


# Enough for the training accuracy to stand still, in minutes.
EPOCHS = {"digits": 150, "usps": 40, "mnist": 15}


def _train(row: Row, images: Images, seed: int) -> dict[str, Any]:
    found = train_classifier(row.config, images, row.recipe, seed)
    say(
        f"{images.name}, seed {seed}, {row.title}: memorisation {found['memorisation']:.2f} %, generalisation "
        f"{found['generalisation']:.2f} %"
    )
    return found


def _facts(row: Row) -> dict[str, Any]:
    return {
        "title": row.title,
        "active": row.active,
        "config": row.config.to_dict(),
        "recipe": dataclasses.asdict(row.recipe),
        "seeds": [],
    }


def report(result: dict[str, Any]) -> str:
    """The tables in Markdown, with what they were made on."""
    machine = result["machine"]
    lines = ["# Leaf trees as image classifiers: Table 1 of the FFF paper (arXiv 2308.14711)", ""]
    for name, found in result["images"].items():
        lines += [f"## {name}", "", table(found), ""]
    lines += [
        f"Training width {result['width']}; mean and standard deviation over the seeds; accuracies in "
        "percent with hard decisions. Memorisation: of the training part, the best of all epochs. Generalisation: of "
        "the test images, at the epoch with the best accuracy on a tenth of the training images that was held out. "
        "Active: hidden neurons that an image meets, with the nodes of a tree and the scores of a router. Published: "
        "generalisation, the best of several runs. Times as fast: evaluation without gradients, against the dense FFN "
        "of the training width, eager or compiled, whichever is faster.",
        "",
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['versions']['torch']}; commit "
        f"{machine['commit'] or 'unknown'}.",
        "",
    ]
    return "\n".join(lines)


def table(found: dict[str, Any]) -> str:
    """One data set's rows in Markdown."""
    inference = found.get("inference")
    lines = []
    for name, row in found["rows"].items():
        speeds = []
        if inference is not None:
            for timed in inference["batches"]:
                seconds = timed["seconds"].get(name)
                base = min(timed["seconds"][key]["median"] for key in inference["baselines"])
                speeds.append("" if seconds is None else f"{base / seconds['median']:.2f}")
        lines.append(
            (
                row["title"],
                row["active"],
                len(row["seeds"]),
                _mean(row["seeds"], "memorisation"),
                _mean(row["seeds"], "generalisation"),
                found["published"].get(name, ""),
                f"{statistics.mean(seed['busiest'] for seed in row['seeds']):.0f}"
                if "busiest" in row["seeds"][0]
                else "",
                *speeds,
            )
        )
    headers = ["FFN", "active", "seeds", "memorisation", "generalisation", "published", "% in the busiest leaf"]
    if inference is not None:
        headers += [f"x as fast, {timed['images']} image(s)" for timed in inference["batches"]]
    alignment = ("left",) + ("right",) * (len(headers) - 1)
    return tabulate(lines, headers=headers, tablefmt="github", colalign=alignment, disable_numparse=True)


def _mean(seeds: list[dict[str, Any]], name: str) -> str:
    values = [seed[name] for seed in seeds]
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
