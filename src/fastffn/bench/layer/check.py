"""The gate of every contender: one layer's outputs and gradients against a float64 copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import fastffn
from fastffn.bench.layer.contender import Contender
from fastffn.errors import BackendError, MeasurementError
from fastffn.measure.gate import gate
from fastffn.ops.triton import precision

# Tokens that are compared, spread over the batch; all of it runs.
COMPARED = 512
# What rounding may change, relative to the largest value: of float32 the sums, of narrower dtypes a few roundings of
# hidden activations too.
FLOORS = {torch.float32: 1e-5, torch.bfloat16: 4 * 2.0**-7, torch.float16: 4 * 2.0**-10}
# Of a score of order one, whose terms are of order one. Narrower dtypes round a score before its bias is added.
MARGINS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def _rounds_as(dtype: torch.dtype) -> torch.dtype:
    """float16 where products in float32 may be TF32, which has as many digits."""
    allowed = dtype == torch.float32 and precision() == "tf32"
    return torch.float16 if allowed else dtype


class Compared(NamedTuple):
    """What a check found.

    Attributes:
        error: the largest relative error.
        tokens: how many were compared; the others lie within rounding of a decision, or were left out of a large batch.
        gradients: whether gradients were compared.
    """

    error: float
    tokens: int
    gradients: bool


def decided(modules: list[Any], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[T]`: whether no decision of a token in any of the layers lies within rounding of a tie."""
    rows = x.to(dtype).double().cpu()
    sure = torch.ones(len(x), dtype=torch.bool)
    for module in modules:
        with torch.no_grad():
            sure &= in_float64(module).decision_margins(rows) > MARGINS[_rounds_as(dtype)]
    return sure


def in_float64(module: nn.Module) -> Any:
    """A float64 copy on the CPU: some accelerators have no float64."""
    return copy.deepcopy(module).cpu().double()


def check(contender: Contender, passes: str, x: torch.Tensor, gradient: torch.Tensor) -> Compared | None:
    """Compares the layers of a contender, as they will be timed, with what they must compute.

    Args:
        contender: in the right mode. None is returned if there is nothing to compare it with, or if it draws at random
            in training.
        passes: `forward` or `forward + backward`.
        x: `[T, D]`; gradient: `[T, O]`.

    Raises:
        MeasurementError: a result is wrong, or there is no token whose decisions are clear.
    """
    if contender.sources is None:
        return None
    # All layers of what is measured; one of the others, whose layers are all alike.
    layers = range(len(contender.sources) if contender.role == "ffn" else 1)
    found = [_check_layer(contender, index, passes, x, gradient) for index in layers]
    clear = [one for one in found if one is not None]
    if len(clear) < len(found):
        return None
    return Compared(
        max(one.error for one in clear), min(one.tokens for one in clear), all(one.gradients for one in clear)
    )


def _check_layer(
    contender: Contender, index: int, passes: str, x: torch.Tensor, gradient: torch.Tensor
) -> Compared | None:
    assert contender.sources is not None
    dtype, both = contender.dtype, passes != "forward"
    x, gradient = x.to(dtype), gradient.to(dtype)
    chosen = torch.linspace(0, len(x) - 1, min(len(x), COMPARED)).round().long()
    source = in_float64(contender.sources[index])
    rows = x[chosen.to(x.device)].cpu().double()
    with torch.no_grad():
        sure = source.decision_margins(rows) > MARGINS[_rounds_as(dtype)]
    chosen, rows = chosen[sure], rows[sure]
    name = f"{contender.name}, layer {index}, {len(x)} tokens"
    if not len(chosen):
        raise MeasurementError(f"{name}: every token has a decision within rounding of a tie. Not timed.")
    # A token that is not compared gets no gradient, and so gives none.
    given = torch.zeros_like(gradient)
    where = chosen.to(x.device)
    given[where] = gradient[where]

    tokens = x.clone().requires_grad_(both)
    module = contender.modules[index]
    module.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(both):
        y = contender.layer(index, tokens, torch.empty_like(gradient))
        if both:
            with contender.asked():
                y.backward(given)
    ours = {"output": y.detach()[where]}
    if both:
        assert tokens.grad is not None
        ours["gradient of x"] = tokens.grad[where]
        # A peer lays its weights out as it likes.
        if contender.role != "peer":
            own = contender.sources[index]
            ours |= {f"gradient of {n}": p.grad for n, p in own.named_parameters() if p.grad is not None}
    exact, repeatable = _exact(source, rows, given[where].cpu().double(), both)
    if not repeatable:
        return None
    error, floor = 0.0, FLOORS[_rounds_as(dtype)]
    for part, value in ours.items():
        right = exact[part]
        error = max(error, gate(f"{name}, {part}", value.cpu(), right.to(dtype), right, floor=floor))
    module.zero_grad(set_to_none=True)
    return Compared(error, len(chosen), both)


def _exact(
    source: nn.Module, rows: torch.Tensor, gradient: torch.Tensor, both: bool
) -> tuple[dict[str, torch.Tensor], bool]:
    """Results in float64, and whether a second run gives the same: what draws at random cannot be compared."""

    def run() -> dict[str, torch.Tensor]:
        source.zero_grad(set_to_none=True)
        x = rows.clone().requires_grad_(both)
        with torch.set_grad_enabled(both):
            y = source(x)
            if both:
                y.backward(gradient)
        found = {"output": y.detach()}
        if both:
            assert x.grad is not None
            found["gradient of x"] = x.grad
            found |= {f"gradient of {n}": p.grad for n, p in source.named_parameters() if p.grad is not None}
        return found

    first, second = _by_reference(run), _by_reference(run)
    return first, torch.equal(first["output"], second["output"])


def _by_reference(run: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    try:
        with fastffn.use_backend("reference"):
            return run()
    except BackendError:
        return run()  # an operation without a definition of its own among the backends: float64 must do
