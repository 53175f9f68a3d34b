"""Rungs of the ladder of trees: which FFN each GPT-2 has, and what is changed about its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Active neurons of most rungs: those of UltraFastBERT's 8x8.
ACTIVE = 72
LEAF = {"depth": 5, "leaf_width": 67, "decisions": "straight_through", "balance_weight": 0.01}


@dataclass(frozen=True)
class Rung:
    """One model of the ladder.

    Attributes:
        name: of its cells and its runs.
        ffn: kind.
        options: of that kind.
        changes: fields of the run that differ from the others'.
        trees_rate: learning rate of the FFN's matrices over that of the rest.
        note: for the table.
    """

    name: str
    ffn: str
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    trees_rate: float = 1.0
    note: str = ""


def _dense(neurons: int, note: str) -> Rung:
    return Rung(f"dense-{neurons}", "dense", changes={"d_hidden": neurons}, note=note)


def _tree(trees: int, depth: int, note: str = "", suffix: str = "", rate: float = 1.0, **options: Any) -> Rung:
    shared = f"+{options['shared']}" if options.get("shared") else ""
    options = {"trees": trees, "depth": depth} | options
    return Rung(f"tree-{trees}x{depth}{shared}{suffix}", "neuron_tree", options, trees_rate=rate, note=note)


def ladder() -> dict[str, Rung]:
    """All rungs, by name."""
    half = ACTIVE // 2
    rungs = [
        _dense(ACTIVE, "equal active width"),
        # The same arithmetic with the trees' start values and no output bias: what is left is the kind.
        _tree(72, 0, "dense, as a tree"),
        _tree(24, 2),
        _tree(12, 5),
        _tree(8, 8, "UltraFastBERT's 8x8"),
        _tree(12, 2, "half shared", shared=half),
        _tree(6, 5, "half shared", shared=half),
        _tree(4, 8, "half shared", shared=half),
        _dense(756, "total width of 12x5"),
        _dense(4088, "total width of 8x8"),
        _tree(8, 8, "straight-through", "-straight", straight_through=True),
        _tree(24, 2, "start like GPT-2's", "-start", start="normal"),
        _tree(12, 5, "start like GPT-2's", "-start", start="normal"),
        _tree(8, 8, "start like GPT-2's", "-start", start="normal"),
        _tree(8, 8, "trees at 3 x the rate", "-fast", 3.0),
        _tree(8, 8, "trees at 1/3 of the rate", "-slow", 1 / 3),
        _tree(
            4,
            8,
            "half shared, straight-through, start",
            "-repaired",
            shared=half,
            straight_through=True,
            start="normal",
        ),
        _dense(12, "active width of 1x11"),
        _tree(1, 11, "UltraFastBERT's 1x11"),
        _tree(1, 11, "start like GPT-2's", "-start", start="normal"),
        _dense(640, "active width of 128x4"),
        _tree(128, 4, "UltraFastBERT's 128x4"),
        # The comparison partners, whose choices have a gradient and are balanced.
        Rung("leaf-5x67", "leaf_tree", LEAF, note="leaf tree: 32 leaves of 67"),
        Rung("moe-2x36", "moe", {"experts": 32, "expert_width": 36, "active": 2}, note="MoE: 2 of 32 experts of 36"),
    ]
    return {rung.name: rung for rung in rungs}
