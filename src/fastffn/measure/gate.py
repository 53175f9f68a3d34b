"""The correctness gate: a result that is not right must not be timed."""

from __future__ import annotations

import torch

from fastffn.errors import MeasurementError


@torch.no_grad()
def gate(name: str, result: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, *, floor: float) -> float:
    """Checks `result` against an exact value, by the measure of what its dtype can do.

    The largest error of `result` may be twice that of `same_dtype` (the plain computation in the same dtype), plus
    `floor`; errors are taken relative to the largest magnitude in `exact`.

    Args:
        name: what is being checked, for the message.
        result: the value to be trusted.
        same_dtype: the reference computed in the same dtype.
        exact: the reference computed in float64.
        floor: relative error that is let pass in any case; state beside the call why.

    Returns:
        The relative error of `result`.

    Raises:
        MeasurementError: the shapes differ, something is not finite, or the error is too large.
    """
    if result.shape != exact.shape:
        raise MeasurementError(f"{name}: shape {list(result.shape)} instead of {list(exact.shape)}.")
    if not torch.isfinite(result).all():
        raise MeasurementError(f"{name}: the result holds values that are not finite.")
    scale = exact.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    error = float((result.double() - exact.double()).abs().max() / scale)
    allowed = 2 * float((same_dtype.double() - exact.double()).abs().max() / scale) + floor
    if not error <= allowed:  # not a number fails too
        raise MeasurementError(f"{name}: relative error {error:.3g}, allowed are {allowed:.3g}. Not timed.")
    return error
