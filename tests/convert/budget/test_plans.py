from __future__ import annotations

import itertools

import pytest
import torch

from fastffn import LowRankConfig
from fastffn.convert.budget.plans import Choice, hull, plans

DENSE = Choice(None, 10.0, 0.0)


def choice(seconds: float, damage: float, rank: int = 1) -> Choice:
    return Choice(LowRankConfig(rank=rank), seconds, damage)


def test_hull_leaves_out_what_is_never_worth_its_price() -> None:
    worse = choice(6, 5)  # slower and worse than the next
    above = choice(7, 4)  # between dense and (4, 3) a mixture of those is better
    slower = choice(12, 1)
    kept = [DENSE, choice(4, 3), choice(2, 8)]
    assert hull([worse, kept[2], DENSE, above, slower, kept[1]]) == kept


def test_steps_come_in_the_order_of_their_price() -> None:
    found = plans({"a": [DENSE, choice(5, 10)], "b": [DENSE, choice(9, 1), choice(5, 9)], "c": [DENSE]})
    assert [plan.seconds for plan in found] == [30, 29, 24, 20]
    assert [plan.changed for plan in found] == [0, 1, 2, 2]
    assert found[0].damage == 0 and found[-1].damage == 19
    assert all(plan.choices["c"] is DENSE for plan in found)


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_beats_a_step(seed: int) -> None:
    """A plan of a step has the least damage of all combinations that are as fast."""
    generator = torch.Generator().manual_seed(seed)
    choices = {
        path: [DENSE] + [choice(*(10 * torch.rand(2, generator=generator)).tolist(), rank=n + 1) for n in range(4)]
        for path in "abc"
    }
    combinations = [
        (sum(c.seconds for c in own), sum(c.damage for c in own)) for own in itertools.product(*choices.values())
    ]
    found = plans(choices)
    for plan in found:
        best = min(damage for seconds, damage in combinations if seconds <= plan.seconds + 1e-9)
        assert plan.damage == pytest.approx(best)
    assert found[-1].seconds == pytest.approx(min(seconds for seconds, _ in combinations))
    assert all(slow.seconds > fast.seconds for slow, fast in itertools.pairwise(found))
