"""What can be said of losses at costs: where a frontier reaches a target, and whether paired differences are chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def cost_to_reach(points: Sequence[tuple[float, float]], target: float) -> tuple[float | None, float | None]:
    """The cost at which runs of growing length end at or below a loss.

    Luck does not count: a run that reaches the target while a longer one misses it is passed over.

    Args:
        points: `(cost, final loss)` of complete runs.
        target: the loss.

    Returns:
        The cost of the cheapest run that reaches the target, as all longer ones do, and the cost in between it and
        the one before, the loss taken as linear in the logarithm of the cost. Both None: not reached.
    """
    cheapest: float | None = None
    between: float | None = None
    later: tuple[float, float] | None = None
    for cost, loss in sorted(points, reverse=True):
        if loss > target:
            if later is not None:
                share = (loss - target) / (loss - later[1])
                between = cost * (later[0] / cost) ** share
            break
        # No shorter run is there to go on from: its own cost, which is too high rather than too low.
        cheapest = between = cost
        later = (cost, loss)
    return cheapest, between


def first_reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The cost at which one run's validations first are at or below a loss, linear between two of them."""
    before: tuple[float, float] | None = None
    for cost, loss in curve:
        if loss <= target:
            if before is None:
                return cost
            return before[0] + (cost - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (cost, loss)
    return None


def paired_test(differences: Sequence[float]) -> dict[str, Any]:
    """Student's t test of paired differences against zero.

    Returns:
        `mean`, standard deviation `sd`, `t`, two-sided `p`; the last three None with fewer than two pairs.
    """
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "sd": None, "t": None, "p": None, "pairs": count}
    sd = statistics.stdev(differences)
    if sd == 0:
        return {"mean": mean, "sd": sd, "t": None, "p": 0.0 if mean else 1.0, "pairs": count}
    t = mean / (sd / math.sqrt(count))
    return {"mean": mean, "sd": sd, "t": t, "p": two_sided(t, count - 1), "pairs": count}


def two_sided(t: float, freedom: int) -> float:
    """Probability of a larger |t| by chance, for whole degrees of freedom.

    Reference: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine = math.cos(angle)
    term = total = cosine if freedom % 2 else 1.0
    for n in range(3 if freedom % 2 else 2, freedom, 2):
        term *= cosine**2 * (n - 1) / n
        total += term
    inside = math.sin(angle) * (0.0 if freedom == 1 else total)
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if freedom % 2 else inside))
