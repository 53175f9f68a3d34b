"""Recipes for training a model within a budget: dense ones, and two-stage ones with what is varied about them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastffn.train.config import PretrainConfig


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        name: of its cells and its runs.
        ffn: kind of stage 1, or `dense`.
        rank: over d_model; None: the kind has none.
        width: over d_model, of the kind `narrow`; of a dense one that is a smaller model, and stays so.
        options: of that kind, others than these.
        changes: fields of the run that differ from the others'.
        factors_rate: learning rate of the factors over that of the rest.
        ffn_rate: that of dense FFNs' matrices, merged ones too, where not all FFNs are among `dense_layers`.
        note: for the table.
    """

    name: str
    ffn: str = "low_rank"
    rank: float | None = 1 / 4
    width: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    factors_rate: float = 1.0
    ffn_rate: float = 1.0
    note: str = ""

    @property
    def dense(self) -> bool:
        """Whether it trains the whole model in one stage."""
        return self.ffn == "dense" and self.width is None

    @property
    def smaller(self) -> bool:
        """Whether it trains a smaller dense model in one stage."""
        return self.ffn == "dense" and self.width is not None

    def run(self, config: PretrainConfig, *, steps: int, rate: float, seed: int) -> PretrainConfig:
        """The run of so many steps at the peak learning rate `rate`."""
        options, changes = dict(self.options), dict(self.changes)
        if self.rank is not None:
            options["rank"] = max(1, round(self.rank * config.d_model))
        if self.width is not None:
            width = max(1, round(self.width * config.d_model))
            if self.ffn == "dense":
                changes["d_hidden"] = width
            else:
                options["width"] = width
        return dataclasses.replace(
            config,
            ffn=self.ffn,
            ffn_options=options,
            baseline=False,
            steps=steps,
            epochs=None,
            learning_rate=rate,
            dense_learning_rate=None,
            factor_learning_rate=None if self.factors_rate == 1 else self.factors_rate * rate,
            ffn_learning_rate=None if self.ffn_rate == 1 else self.ffn_rate * rate,
            seed=seed,
            **changes,
        )


def _dense(name: str, note: str, **changes: Any) -> Recipe:
    return Recipe(name, "dense", None, changes=changes, note=note)


def _low_rank(name: str, note: str, **fields: Any) -> Recipe:
    return Recipe(name, note=note, **fields)


def _narrow(name: str, note: str, width: float, rate: float = 1.0, merged: float = 1.0, **changes: Any) -> Recipe:
    return Recipe(name, "narrow", None, width, changes=changes, factors_rate=rate, ffn_rate=merged, note=note)


# What others did not beat: dense training in its best forms, smaller models, the best of each kind of first stage.
CONTENDERS = (
    "dense",
    "dense-ffn-2x",
    "dense-upper-8th",
    "half-stays-2x",
    "quarter-stays-2x",
    "narrow-2x-70-2x",
    "first-dense-16th-80",
)


def recipes() -> dict[str, Recipe]:
    """All recipes, by name; the first is the dense one that every experiment has."""
    warm = {"dense_warmup": 0.1}
    first = {"dense_layers": 1}
    late = {"switch": 0.8, "decay": 0.2}
    found = [
        _dense("dense", "one stage"),
        _dense("dense-decay-60", "the rate falls over 60 % of the steps", decay=0.6),
        _dense("dense-decay-15", "the rate falls over 15 % of the steps", decay=0.15),
        # The knobs that two-stage recipes have.
        Recipe("dense-ffn-2x", "dense", None, ffn_rate=2.0, note="FFNs at twice the rate"),
        Recipe("dense-ffn-4x", "dense", None, ffn_rate=4.0, note="FFNs at four times the rate"),
        *(
            Recipe(
                f"dense-upper-{part}th",
                "dense",
                None,
                changes=first,
                ffn_rate=1 / part,
                note=f"FFNs after the first at 1/{part} of the rate",
            )
            for part in (4, 8)
        ),
        # Controls: if these win, the model was too large for the budget, and no first stage is needed.
        Recipe(
            "half-stays-2x", "dense", None, 2.0, ffn_rate=2.0, note="a model of 2 d neurons, FFNs at twice the rate"
        ),
        Recipe(
            "quarter-stays-2x",
            "dense",
            None,
            1.0,
            ffn_rate=2.0,
            note="a model of d neurons, FFNs at twice the rate",
        ),
        _low_rank("naive", "rank d/4, switch after 60 %"),
        _low_rank("rank-8th", "rank d/8", rank=1 / 8),
        _low_rank("rank-half", "rank d/2", rank=1 / 2),
        Recipe("block", "block", None, note="4 blocks"),
        Recipe("block-normal", "block", None, options={"start": "normal"}, note="4 blocks, random factors"),
        Recipe("block-rank", "block", 1 / 16, options={"blocks": 8}, note="8 blocks and rank d/16"),
        _narrow("no-ffn", "one neuron awake", 0.0),
        _narrow("narrow", "d neurons awake", 1.0),
        _narrow("narrow-2x", "d neurons awake, FFNs at twice the rate", 1.0, 2.0),
        _narrow("narrow-2x-30", "d neurons awake, twice the rate, switch after 30 %", 1.0, 2.0, switch=0.3),
        _narrow("narrow-2x-70", "d neurons awake, twice the rate, switch after 70 %", 1.0, 2.0, switch=0.7),
        _narrow(
            "narrow-2x-70-2x",
            "d neurons awake, twice the rate, after the switch at 70 % too",
            1.0,
            2.0,
            2.0,
            switch=0.7,
        ),
        _narrow("narrow-4x", "d neurons awake, four times the rate", 1.0, 4.0),
        _narrow("half-2x", "2 d neurons awake, FFNs at twice the rate", 2.0, 2.0),
        _narrow("quarter-4x", "d/2 neurons awake, four times the rate", 0.5, 4.0),
        _low_rank("normal", "random factors", options={"start": "normal"}),
        _low_rank("rescale", "spectral start rescaled to the dense norm", options={"rescale": True}),
        _low_rank("factor-decay", "weight decay on each factor", changes={"frobenius_decay": False}),
        _low_rank("factors-2x", "factors at twice the rate", factors_rate=2.0),
        _low_rank("factors-4x", "factors at four times the rate", factors_rate=4.0),
        _low_rank("factors-2x-30", "twice the rate, switch after 30 %", factors_rate=2.0, changes={"switch": 0.3}),
        _low_rank("warm-5", "dense for the first 5 %", changes={"dense_warmup": 0.05}),
        _low_rank("warm-10", "dense for the first 10 %", changes=warm),
        _low_rank("first-dense", "first FFN dense", changes=first),
        _low_rank(
            "first-dense-8th-70",
            "first FFN dense, rank d/8, switch after 70 %",
            rank=1 / 8,
            changes=first | {"switch": 0.7},
        ),
        _low_rank(
            "first-dense-16th-80", "first FFN dense, rank d/16, switch after 80 %", rank=1 / 16, changes=first | late
        ),
        _low_rank("warm-10-2x", "dense for the first 10 %, factors at twice the rate", changes=warm, factors_rate=2.0),
    ]
    return {recipe.name: recipe for recipe in found}
