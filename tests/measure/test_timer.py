from __future__ import annotations

import pytest

from fastffn.measure import timer
from fastffn.measure.timer import alternate


def test_takes_turns_and_turns_around() -> None:
    order: list[str] = []
    timings = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_the_first_of_a_block_is_not_timed() -> None:
    calls: list[int] = []
    timings = alternate({"a": lambda: calls.append(1)}, rounds=4, block=3, warmup=0)
    assert len(calls) == 12
    assert timings["a"].calls == 8


def test_median_and_quartiles(monkeypatch) -> None:
    now = [0.0]
    lengths = iter([100.0, 1.0, 2.0, 3.0, 4.0, 50.0])
    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(lengths)

    timing = alternate({"a": call}, rounds=5, warmup=1)["a"]
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)


def test_errors_pass_through() -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        alternate({"a": fail}, rounds=1)


def test_what_lies_between_is_not_timed(monkeypatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])

    def act(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds

    calls = {"a": lambda: act("a", 1.0)}
    timing = alternate(calls, rounds=2, block=2, warmup=0, between=lambda: act("between", 10.0))["a"]
    assert order == ["between", "a"] * 4
    assert timing.high == 1.0
