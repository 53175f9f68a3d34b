"""What a conversion within a budget has found: what became of each FFN, and the trade-off that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastffn.convert.budget.plans import Plan
from fastffn.convert.budget.quality import Quality
from fastffn.convert.files import write_figure, write_json
from fastffn.convert.report import ConversionReport


@dataclass(frozen=True)
class Point:
    """A plan that was tried on the model, and the quality that the model then had."""

    plan: Plan
    quality: Quality


@dataclass(frozen=True)
class BudgetReport:
    """What was found.

    Attributes:
        conversion: what became of each FFN.
        curve: what was tried, from all dense to the fastest; `curve[0]` is the dense model.
        chosen: which of these is in place.
        tokens: held-out tokens on which quality was measured.
        budget: in words.
    """

    conversion: ConversionReport
    curve: tuple[Point, ...]
    chosen: Point
    tokens: int
    budget: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "budget": self.budget,
            "held_out_tokens": self.tokens,
            "chosen": self._row(self.chosen),
            "curve": [self._row(point) for point in self.curve],
            **self.conversion.to_dict(),
        }

    def __str__(self) -> str:
        return (
            f"{self.conversion}\nFFNs {self.speed(self.chosen):.2f} times as fast together; measured "
            f"{self.chosen.quality.value:.4f}, dense {self.curve[0].quality.value:.4f}, allowed: {self.budget}"
        )

    def _row(self, point: Point) -> dict[str, Any]:
        return {
            "changed": point.plan.changed,
            "speed": self.speed(point),
            "expected_damage": point.plan.damage,
            "damage": point.quality.damage,
            "value": point.quality.value,
        }

    def speed(self, point: Point) -> float:
        """How many times as fast as the dense ones all FFNs together are, from times of each by itself."""
        return self.curve[0].plan.seconds / point.plan.seconds

    def save(self, directory: Path) -> None:
        """Writes `conversion.json` and `tradeoff.png`."""
        write_json(directory / "conversion.json", self.to_dict())
        self._plot(directory / "tradeoff.png")

    def _plot(self, file: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        speeds = [self.speed(point) for point in self.curve]
        axes.plot(speeds, [point.quality.damage for point in self.curve], "o-", label="measured")
        axes.plot(speeds, [point.plan.damage for point in self.curve], ":", label="expected")
        axes.plot([self.speed(self.chosen)], [self.chosen.quality.damage], "s", label=f"taken: {self.budget}")
        axes.set_xlabel("speed of all FFNs, times dense")
        axes.set_ylabel("damage (KL in nats, or 1 - cosine)")
        axes.legend()
        figure.tight_layout()
        write_figure(file, figure)
