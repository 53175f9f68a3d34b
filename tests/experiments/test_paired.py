"""Frontiers and paired tests, against cases worked by hand and printed tables."""

from __future__ import annotations

import math

import pytest

from fastffn.experiments.paired import cost_to_reach, first_reached, paired_test, two_sided

RUNS = [(100.0, 5.0), (200.0, 4.0), (400.0, 3.0)]


def test_cost_of_the_cheapest_run_and_in_between() -> None:
    by_run, between = cost_to_reach(RUNS, 3.5)
    assert by_run == 400
    assert between == pytest.approx(math.sqrt(200 * 400))
    assert cost_to_reach(RUNS[::-1], 3.5) == (by_run, between)
    assert cost_to_reach(RUNS, 4.0) == (200, 200)


def test_what_no_run_reaches_and_what_all_reach() -> None:
    assert cost_to_reach(RUNS, 2.9) == (None, None)
    # Nothing is said of runs shorter than the shortest.
    assert cost_to_reach(RUNS, 9.0) == (100, 100)
    assert cost_to_reach([], 9.0) == (None, None)


def test_a_lucky_run_does_not_count() -> None:
    lucky = [(100.0, 3.0), (200.0, 4.0), (400.0, 3.0)]
    by_run, between = cost_to_reach(lucky, 3.5)
    assert by_run == 400 and between == pytest.approx(math.sqrt(200 * 400))
    assert cost_to_reach([(100.0, 3.0), (200.0, 4.0)], 3.5) == (None, None)


def test_first_reached_is_linear_between_validations() -> None:
    curve = [(10.0, 5.0), (20.0, 4.0), (30.0, 4.5), (40.0, 3.0)]
    assert first_reached(curve, 4.25) == pytest.approx(17.5)
    assert first_reached(curve, 3.0) == pytest.approx(40)
    assert first_reached(curve, 6.0) == 10
    assert first_reached(curve, 2.0) is None


# Student's t, two-sided, from printed tables.
@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (12.706, 1, 0.05),
        (4.303, 2, 0.05),
        (3.182, 3, 0.05),
        (2.776, 4, 0.05),
        (4.604, 4, 0.01),
        (6.869, 5, 0.001),
        (2.262, 9, 0.05),
        (2.042, 30, 0.05),
    ],
)
def test_student(t, freedom, p) -> None:
    assert two_sided(t, freedom) == pytest.approx(p, rel=2e-3)
    assert two_sided(-t, freedom) == two_sided(t, freedom)


def test_paired() -> None:
    # By hand: mean -2, deviation 1, t = -2 sqrt(3).
    found = paired_test([-1.0, -2.0, -3.0])
    assert (found["mean"], found["sd"], found["pairs"]) == (-2, 1, 3)
    assert found["t"] == pytest.approx(-2 * math.sqrt(3))
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)
    assert paired_test([0.5]) == {"mean": 0.5, "sd": None, "t": None, "p": None, "pairs": 1}
    assert paired_test([0.0, 0.0])["p"] == 1
    assert paired_test([1.0, 1.0])["p"] == 0
