from __future__ import annotations

import pytest
import torch

from fastffn.errors import MeasurementError
from fastffn.measure.gate import gate


def test_lets_the_errors_of_a_dtype_pass() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    rounded = exact.bfloat16()
    assert gate("rounded", rounded, rounded, exact, floor=0.0) < 2**-8


@pytest.mark.parametrize("change", [lambda x: x + 0.01, lambda x: x * float("nan"), lambda x: x[:-1]])
def test_stops_what_is_wrong(change) -> None:
    exact = torch.randn(100, dtype=torch.float64)
    same_dtype = exact.float()
    with pytest.raises(MeasurementError, match="thing"):
        gate("thing", change(same_dtype), same_dtype, exact, floor=1e-6)


@pytest.mark.parametrize("broken", ["same_dtype", "exact"])
def test_a_yardstick_that_is_no_number_lets_nothing_pass(broken) -> None:
    values = {"same_dtype": torch.ones(3), "exact": torch.ones(3, dtype=torch.float64)}
    values[broken] = values[broken] * float("nan")
    with pytest.raises(MeasurementError):
        gate("thing", torch.ones(3), **values, floor=1.0)


def test_twice_the_error_is_the_limit() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    same_dtype = exact + 0.01
    gate("below", exact + 0.0199, same_dtype, exact, floor=0.0)
    with pytest.raises(MeasurementError):
        gate("above", exact + 0.0201, same_dtype, exact, floor=0.0)
    gate("floor", exact + 0.0201, same_dtype, exact, floor=0.001)
