"""What the runs of the time-to-loss protocol come to: each against dense training of the same loss, in any currency."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastffn.experiments.paired import cost_to_reach, first_reached, paired_test
from fastffn.experiments.run_cost import Price, curve


def tuned_dense(sweep: Mapping[str, Any]) -> tuple[str, float]:
    """The dense recipe and the rate with the lowest loss."""
    runs = [run for row in sweep.values() if row["dense"] for run in row["runs"]]
    best = min(runs, key=lambda run: run["loss"])
    return best["recipe"], best["rate"]


def best_rate(row: Mapping[str, Any]) -> float:
    """That of the run with the lowest loss."""
    return float(min(row["runs"], key=lambda run: run["loss"])["rate"])


def cost(run: dict[str, Any], prices: Mapping[str, Price]) -> float:
    """Of the whole run."""
    return curve(run, prices[run["recipe"]])[-1][0]


def screened(
    sweep: Mapping[str, Any],
    frontier: Sequence[dict[str, Any]],
    flops: Mapping[str, Price],
    smaller: Sequence[Sequence[dict[str, Any]]] = (),
) -> dict[str, Any]:
    """One seed: each recipe at its best rate, against dense training that ends at the same loss.

    Args:
        sweep: for each recipe its runs at all rates.
        frontier: runs of the tuned dense recipe, of growing length.
        flops: prices, by recipe.
        smaller: frontiers of models that are smaller from beginning to end.

    Returns:
        For each recipe `ratio`: its FLOPs over those at which the dense frontier reaches its loss; `beyond`: whether
        that is only a bound, because the loss lies below (`<`) or above (`>`) all of the frontier's. Where there are
        smaller models, `any_width` is both against the cheapest of them and the dense one.
    """
    points = _points(frontier, flops)
    widths = [points, *(_points(runs, flops) for runs in smaller)]
    full = points[-1][0]
    rows: dict[str, Any] = {}
    for name, row in sweep.items():
        losses = {f"{run['rate']:g}": run["loss"] for run in row["runs"]}
        best = min(row["runs"], key=lambda run: run["loss"])
        rates = [run["rate"] for run in row["runs"]]
        spent = cost(best, flops)
        equal, beyond = _equal([points], best["loss"])
        rows[name] = {
            "note": row["note"],
            "losses": losses,
            "rate": best["rate"],
            # The best one may lie beyond the grid.
            "at_edge": len(rates) > 1 and best["rate"] in (min(rates), max(rates)),
            "loss": best["loss"],
            "flops": spent,
            "flops_share": spent / full,
            "ratio": spent / equal,
            "beyond": beyond,
            "curve": [list(point) for point in curve(best, flops[name])],
        }
        if smaller:
            equal, beyond = _equal(widths, best["loss"])
            rows[name]["any_width"] = {"ratio": spent / equal, "beyond": beyond}
    for runs, own in zip((frontier, *smaller), widths, strict=True):
        rows[runs[-1]["recipe"]]["frontier"] = [list(point) for point in own]
    return rows


def _points(runs: Sequence[dict[str, Any]], flops: Mapping[str, Price]) -> list[tuple[float, float]]:
    """Cost and final loss, by cost."""
    return sorted((cost(run, flops), run["loss"]) for run in runs)


def _equal(frontiers: Sequence[Sequence[tuple[float, float]]], loss: float) -> tuple[float, str]:
    """The least cost at which one of the frontiers is at a loss, and `<` or `>` where that is a bound only."""
    found = []
    for points in frontiers:
        between = cost_to_reach(points, loss)[1]
        if between is not None:
            found.append((between, ">" if loss > points[0][1] else ""))
    # Below all of them: no better bound than the longest run.
    return min(found, default=(max(points[-1][0] for points in frontiers), "<"))


def compared(
    paired: Mapping[str, Sequence[dict[str, Any]]],
    dense: str,
    flops: Mapping[str, Price],
    seconds: Mapping[str, Price] | None,
) -> dict[str, Any]:
    """Several seeds: recipes of several lengths against dense training of full length, seed by seed.

    Args:
        paired: runs by recipe, those of the dense one among them; each with its `word_perplexity`, or None.
        dense: name of the dense recipe.
        flops, seconds: prices, by recipe; seconds None: not measured yet.
    """
    targets = {run["seed"]: run for run in paired[dense]}
    found: dict[str, Any] = {
        "seeds": sorted(targets),
        "dense": {
            "loss": [targets[seed]["loss"] for seed in sorted(targets)],
            "word_perplexity": [targets[seed]["word_perplexity"] for seed in sorted(targets)],
            "clock_seconds": [targets[seed]["clock_seconds"] for seed in sorted(targets)],
        },
        "recipes": {},
    }
    for name, runs in paired.items():
        if name == dense:
            continue
        row: dict[str, Any] = {"lengths": [], "flops": _ratios(runs, targets, flops)}
        row["seconds"] = _ratios(runs, targets, seconds) if seconds is not None else None
        for length in sorted({run["length"] for run in runs}):
            same = sorted((run for run in runs if run["length"] == length), key=lambda run: int(run["seed"]))
            dense_runs = [targets[run["seed"]] for run in same]
            row["lengths"].append(
                {
                    "length": length,
                    "flops_ratio": cost(same[0], flops) / cost(dense_runs[0], flops),
                    "seconds_ratio": None if seconds is None else cost(same[0], seconds) / cost(dense_runs[0], seconds),
                    "clock_ratio": [
                        a["clock_seconds"] / b["clock_seconds"] for a, b in zip(same, dense_runs, strict=True)
                    ],
                    "loss": [run["loss"] for run in same],
                    "difference": paired_test([a["loss"] - b["loss"] for a, b in zip(same, dense_runs, strict=True)]),
                    "word_perplexity": [run["word_perplexity"] for run in same],
                }
            )
        found["recipes"][name] = row
    return found


def _ratios(
    runs: Sequence[dict[str, Any]], targets: Mapping[int, dict[str, Any]], prices: Mapping[str, Price]
) -> dict[str, Any]:
    """For every seed the cost of reaching the dense loss over the dense cost; None: not reached.

    `by_run`: of the cheapest complete run that reaches it; `between`: in between two complete runs; `within`: within
    the longest run, at the first validation at or below it.
    """
    found: dict[str, Any] = {"by_run": [], "between": [], "within": []}
    for seed in sorted(targets):
        own = [run for run in runs if run["seed"] == seed]
        target = targets[seed]
        whole = cost(target, prices)
        by_run, between = cost_to_reach([(cost(run, prices), run["loss"]) for run in own], target["loss"])
        longest = max(own, key=lambda run: float(run["length"]))
        within = first_reached(curve(longest, prices[longest["recipe"]]), target["loss"])
        for name, value in (("by_run", by_run), ("between", between), ("within", within)):
            found[name].append(None if value is None else value / whole)
    for name in ("by_run", "between", "within"):
        reached = [value for value in found[name] if value is not None]
        found[f"{name}_mean"] = statistics.mean(reached) if len(reached) == len(found[name]) else None
        found[f"{name}_sd"] = (
            statistics.stdev(reached) if len(reached) == len(found[name]) and len(reached) > 1 else None
        )
    return found
