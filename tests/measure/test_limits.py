from __future__ import annotations

import pytest
import torch

from fastffn.measure import limits as module
from fastffn.measure.limits import Limits, fresh_seconds, measure_limits

CPU = torch.device("cpu")


def test_measures_what_there_is() -> None:
    found = measure_limits(torch.float32, CPU, sizes=(2**14, 2**16))
    assert found.multiply_adds > 1e6
    for measured in (found.reads, found.writes):
        assert set(measured) == {2**14, 2**16}
        # A smaller working set is never slower, whatever the calls cost.
        assert measured[2**14] >= measured[2**16] > 0
    assert found.first_touch is not None and found.first_touch > 0


def test_a_working_set_is_as_fast_as_the_next_smaller_one_measured() -> None:
    found = Limits(1.0, {100: 8.0, 1000: 4.0, 10_000: 2.0}, {100: 80.0, 1000: 40.0}, None)
    assert [found.read(size) for size in (5, 100, 999, 1000, 10**9)] == [8, 8, 8, 4, 2]
    assert [found.write(size) for size in (5, 5000)] == [80, 40]
    assert found.at_least(3.0).multiply_adds == 3.0
    assert found.at_least(0.5).multiply_adds == 1.0


def test_fresh_memory_costs_what_exceeds_writing_it(monkeypatch) -> None:
    # (taken fresh, written again) of the pieces, then of pieces of one byte; four times, with small pages and with
    # large, of which the least counts.
    seconds = iter([9.0, 4.0, 0.5, 0.25, 7.0, 4.0, 0.5, 0.25, 8.0, 4.0, 0.5, 0.25, 9.0, 4.0, 0.5, 0.25])
    monkeypatch.setattr(module, "_best", lambda run, size: next(seconds))
    assert fresh_seconds([10, 20], CPU) == 7 - 4 - 0.25
    seconds = iter([1.0, 4.0, 0.5, 0.25] * 4)
    assert fresh_seconds([10], CPU) == 0
    assert fresh_seconds([], CPU) == 0
    assert fresh_seconds([10], torch.device("meta")) == 0


def test_large_fresh_memory_costs_something() -> None:
    # More than an allocator keeps: each piece comes from the system, page by page.
    assert fresh_seconds([2**27], CPU) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_dtype_is_bounded_by_float32_where_that_is_faster(dtype, monkeypatch) -> None:
    monkeypatch.setattr(module, "_products", lambda kind, device: 5.0 if kind == torch.float32 else 3.0)
    assert measure_limits(dtype, CPU, sizes=(2**10,)).multiply_adds == 5.0
