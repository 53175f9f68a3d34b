"""Which FFN becomes what: the trade-off between time and damage, from what was measured of each FFN by itself.

Damages of several FFNs are taken to add up. Then the best plans are found one step at a time: of all changes of one
FFN, next comes the one that costs least damage for the time it saves. (The lower convex hull of each FFN's choices, and
of their sum; plans between two steps could only be a little better.)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastffn.nn import FFNConfig


@dataclass(frozen=True)
class Choice:
    """What one FFN can become.

    Attributes:
        config: the kind and its size; None to stay dense.
        seconds: of a call.
        damage: to the model, if only this FFN becomes so.
    """

    config: FFNConfig | None
    seconds: float
    damage: float


@dataclass(frozen=True)
class Plan:
    """What every FFN becomes, by path; `seconds` and `damage` are the sums of what is expected."""

    choices: Mapping[str, Choice]

    @property
    def seconds(self) -> float:
        """Of a call of all FFNs."""
        return sum(choice.seconds for choice in self.choices.values())

    @property
    def damage(self) -> float:
        """To the model."""
        return sum(choice.damage for choice in self.choices.values())

    @property
    def changed(self) -> int:
        """FFNs that do not stay dense."""
        return sum(choice.config is not None for choice in self.choices.values())


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Choices worth making for some price of time, the slowest first: the lower convex hull of damage over time."""
    ordered = sorted(choices, key=lambda choice: (choice.seconds, choice.damage))
    kept: list[Choice] = []
    for choice in ordered:
        if kept and choice.damage >= kept[-1].damage:
            continue
        while len(kept) > 1 and _price(choice, kept[-1]) >= _price(kept[-1], kept[-2]):
            kept.pop()
        kept.append(choice)
    return kept[::-1]


def _price(slow: Choice, fast: Choice) -> float:
    """Damage a second that is saved."""
    return (fast.damage - slow.damage) / (slow.seconds - fast.seconds)


def plans(choices: Mapping[str, Sequence[Choice]]) -> list[Plan]:
    """The best plans, from all dense to the fastest, each a step from the one before.

    Args:
        choices: of each FFN by path, the dense one (`config` None) among them.
    """
    hulls = {path: hull(own) for path, own in choices.items()}
    steps = sorted(
        (_price(slow, fast), number, path)
        for path, own in hulls.items()
        for number, (slow, fast) in enumerate(itertools.pairwise(own))
    )
    current = {path: own[0] for path, own in hulls.items()}
    found = [Plan(dict(current))]
    for _, number, path in steps:
        current[path] = hulls[path][number + 1]
        found.append(Plan(dict(current)))
    return found
