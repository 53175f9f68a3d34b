"""Two-stage training against tuned dense training: the cost at which the same validation loss is reached.

Every run is complete: its learning rate warms up, stays and falls to the end of its own length, so that no run is
judged in the middle of its schedule. The target is the final loss of the tuned dense run; what a recipe needs is the
cost of its shortest run that reaches the target. The protocol, in this order:

1. Sweep, on one seed: dense training and every recipe at each learning rate of one grid, at full length.
2. The dense frontier, on that seed: the best dense training at shorter lengths. A recipe's loss then has an equal: the
   cost at which dense training reaches it. Likewise for models that are smaller from beginning to end: where one of
   them is the cheaper way to that loss, the model is too large for its budget, and no first stage is needed.
3. Confirmation: dense training and the best recipes, each at its best rate, on seeds that the sweep has not seen. A
   recipe is trained at several lengths and compared with dense training of full length, seed by seed.

Cost is counted in FLOPs, and reckoned in seconds from steps that are timed side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastffn.convert.files import new_directory, write_json, write_text
from fastffn.data.text import find_text
from fastffn.errors import ConfigError, did_you_mean
from fastffn.evaluate.perplexity import evaluate_perplexity
from fastffn.experiments.cells import Cells, opened, together
from fastffn.experiments.recipes import CONTENDERS, Recipe, recipes
from fastffn.experiments.run_cost import Price, flops_of, record_of, seconds_of
from fastffn.experiments.time_to_loss_figures import best_rate, compared, screened, tuned_dense
from fastffn.experiments.time_to_loss_report import plot, report
from fastffn.experiments.wikitext2 import wikitext_2
from fastffn.measure.machine import describe_machine
from fastffn.train.config import RATES as RATES_OF_A_RUN
from fastffn.train.config import PretrainConfig
from fastffn.train.pretrain import pretrain
from fastffn.train.processes import say
from fastffn.train.text import read_text

RATES = (1e-3, 2e-3, 4e-3)
LENGTHS = (0.6, 0.8, 0.9, 1.0)


def time_to_loss(
    config: PretrainConfig,
    output: Path,
    *,
    names: Sequence[str] = (),
    rates: Sequence[float] = RATES,
    lengths: Sequence[float] = LENGTHS,
    seeds: int = 5,
    confirm: int = 2,
    timing: bool = True,
) -> dict[str, Any]:
    """Runs the protocol; the same call goes on with what was interrupted.

    Args:
        config: a dense run; its steps are the full length, its seed is that of the sweep.
        output: directory for the cells, the runs, `table.md`, `result.json` and `frontier.png`.
        names: of recipes of `fastffn.experiments.recipes`; empty: those that others did not beat.
        rates: the grid of learning rates.
        lengths: of runs, over the full length; 1 is always among them.
        seeds: number of paired seeds of the confirmation, those after the sweep's; 0: none.
        confirm: how many recipes are confirmed.
        timing: whether to time steps, where that has not been done yet.

    Returns:
        What is in `result.json`.

    Raises:
        ConfigError: `config` describes stages of its own, a recipe is unknown, a number is out of range.
        DataError: WikiText-2 is not to be found, and there is something to confirm.
        OutputError: `output` holds something else.
    """
    known = recipes()
    chosen = _chosen(config, names, rates, lengths, seeds, confirm)
    if seeds and not config.masked:
        # Not after hours of training.
        find_text(**wikitext_2()["test"])
    own = {"seed", *RATES_OF_A_RUN}
    settings = {"experiment": "time-to-loss"} | {n: v for n, v in config.to_flat().items() if n not in own}
    with opened(output, settings) as cells:
        if not (output / "tokenizer").is_dir():
            with new_directory(output / "tokenizer") as partial_directory:
                read_text(config, None).tokenizer.save_pretrained(partial_directory)
        config = dataclasses.replace(config, tokenizer=str(output / "tokenizer"))
        vocabulary = len(read_text(config, output / "tokenizer").tokenizer)
        runs = _Runs(config, cells, sorted({1.0, *lengths}))
        one_of_each = {recipe.name: runs.config_of(recipe, 1.0, min(rates), config.seed) for recipe in chosen}
        flops = {name: flops_of(run, vocabulary) for name, run in one_of_each.items()}
        sweep = runs.sweep(chosen, sorted(rates))
        dense, rate = tuned_dense(sweep)
        # As far as the FLOPs of the dense run of full length go.
        smaller = [
            runs.frontier(known[name], best_rate(row), flops[dense].dense / flops[name].dense)
            for name, row in sweep.items()
            if known[name].smaller
        ]
        screen = screened(sweep, runs.frontier(known[dense], rate), flops, smaller)
        seconds, confirmed = None, None
        if timing:
            name = together("step-seconds", one_of_each)
            seconds = cells.get(name, partial(seconds_of, one_of_each, vocabulary, output / "timing" / name))
        if seeds:
            best = sorted((name for name in sweep if not known[name].dense), key=lambda name: screen[name]["ratio"])
            paired = runs.paired([known[name] for name in best[:confirm]], known[dense], screen, seeds)
            prices = {n: Price(**price) for n, price in seconds["prices"].items()} if seconds is not None else None
            confirmed = compared(paired, dense, flops, prices)
        result = {
            "config": {name: value for name, value in settings.items() if name != "experiment"},
            "rates": sorted(rates),
            "lengths": runs.lengths,
            "sweep_seed": config.seed,
            "dense": dense,
            "screen": screen,
            "confirmed": confirmed,
            "step": seconds,
            "machine": describe_machine(),
        }
        write_json(output / "result.json", result)
        write_text(output / "table.md", report(result))
        plot(result, output / "frontier.png")
    return result


def _chosen(
    config: PretrainConfig,
    names: Sequence[str],
    rates: Sequence[float],
    lengths: Sequence[float],
    seeds: int,
    confirm: int,
) -> list[Recipe]:
    """The recipes; the plain dense one is always among them.

    Raises:
        ConfigError: see `time_to_loss`.
    """
    if config.ffn != "dense" or config.init_from is not None or config.steps is None:
        raise ConfigError("The recipes choose FFNs and stages; leave out ffn and its options, and give steps.")
    if not rates or any(rate <= 0 for rate in rates):
        raise ConfigError(f"rates are {list(rates)}; give at least one, all above 0.")
    if any(not 0 < length <= 1 for length in lengths):
        raise ConfigError(f"lengths are {list(lengths)}; they must be above 0 and at most 1, the full length.")
    if seeds < 0 or confirm < 1:
        raise ConfigError(f"seeds is {seeds} and confirm {confirm}; they must be at least 0 and 1.")
    known = recipes()
    for name in names:
        if name not in known:
            raise ConfigError(f"Unknown recipe '{name}'; there are {', '.join(known)}.{did_you_mean(name, known)}")
    wanted = {next(iter(known)), *(names or CONTENDERS)}
    return [recipe for name, recipe in known.items() if name in wanted]


class _Runs:
    """The runs of the protocol; each is a cell."""

    def __init__(self, config: PretrainConfig, cells: Cells, lengths: list[float]) -> None:
        self.config = config
        self.cells = cells
        self.lengths = lengths

    def config_of(self, recipe: Recipe, length: float, rate: float, seed: int) -> PretrainConfig:
        """The run of a recipe at a part of the full length."""
        assert self.config.steps is not None
        return recipe.run(self.config, steps=round(length * self.config.steps), rate=rate, seed=seed)

    def trained(self, recipe: Recipe, length: float, rate: float, seed: int) -> dict[str, Any]:
        """What is kept of that run."""
        run = self.config_of(recipe, length, rate, seed)
        name = f"{recipe.name}-{run.steps}-{rate:g}-seed-{seed}"

        def train() -> dict[str, Any]:
            say(f"\n{recipe.name} ({recipe.note}): {run.steps} steps at {rate:g}, seed {seed}")
            kept = {"recipe": recipe.name, "steps": run.steps, "length": length, "rate": rate, "seed": seed}
            return kept | record_of(run, pretrain(run, self.cells.output / "runs" / name))

        return self.cells.get(name, train)

    def sweep(self, chosen: list[Recipe], rates: list[float]) -> dict[str, dict[str, Any]]:
        """For each recipe its note, and its runs at every rate."""
        # The dense side first: it is what all others are compared with.
        order = sorted(chosen, key=lambda recipe: not recipe.dense)
        return {
            recipe.name: {
                "note": recipe.note,
                "dense": recipe.dense,
                "runs": [self.trained(recipe, 1.0, rate, self.config.seed) for rate in rates],
            }
            for recipe in order
        }

    def frontier(self, recipe: Recipe, rate: float, longest: float = 1.0) -> list[dict[str, Any]]:
        """Runs of every length on the sweep's seed; the longest may be longer than the others' full length."""
        lengths = sorted({*self.lengths, longest})
        return [self.trained(recipe, length, rate, self.config.seed) for length in lengths]

    def paired(
        self, best: list[Recipe], dense: Recipe, screen: dict[str, Any], seeds: int
    ) -> dict[str, list[dict[str, Any]]]:
        """Runs on seeds that the sweep has not seen: dense ones of full length, the recipes' of every length."""
        found: dict[str, list[dict[str, Any]]] = {recipe.name: [] for recipe in (dense, *best)}
        # One seed of everything, then the next.
        for seed in range(self.config.seed + 1, self.config.seed + 1 + seeds):
            for recipe in (dense, *best):
                for length in [1.0] if recipe.dense else self.lengths:
                    run = self.trained(recipe, length, screen[recipe.name]["rate"], seed)
                    found[recipe.name].append(run | {"word_perplexity": self._word_perplexity(run)})
        return found

    def _word_perplexity(self, run: dict[str, Any]) -> float | None:
        """Of the final model, merged where there was something to merge, on the test split of WikiText-2.

        None for a model of masked tokens, which has no such thing.
        """
        if self.config.masked:
            return None
        name = f"{run['recipe']}-{run['steps']}-{run['rate']:g}-seed-{run['seed']}"
        model = self.cells.output / "runs" / name / run["stages"][-1]["name"]
        test = wikitext_2()["test"]
        found = self.cells.get(f"{name}-wikitext-2", lambda: evaluate_perplexity(model, **test))
        return float(found["word_perplexity"])
