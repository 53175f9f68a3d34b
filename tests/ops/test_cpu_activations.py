"""The compiled activations, through a tree of one node: `y = act(x)` where both weights are one."""

from __future__ import annotations

import pytest
import torch

from fastffn.ops import cpu
from fastffn.ops.activations import ACTIVATIONS, get_activation, get_activation_backward
from fastffn.ops.neuron_tree.cpu import IMPL
from tests.ops.isa import instruction_set

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="the compiled module is not there")

# From subnormal arguments to those where every activation has its limit.
POSITIVE = torch.cat([torch.logspace(-30, -6, 200), torch.logspace(-6, 1.9, 2000)])
POINTS = torch.cat([-POSITIVE.flip(0), torch.zeros(1), POSITIVE])


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_relative_error_at_every_magnitude(isa: str, name: str) -> None:
    x, one = POINTS.unsqueeze(1), torch.ones(1, 1, 1)
    with instruction_set(isa):
        y, scores, last = IMPL.forward(x, one, None, one, name, False, keep=True, out=None)
        (slope, *_) = IMPL.backward(
            torch.ones_like(y), x, one, None, one, name, False, scores, last, needs=(True, False, False, False)
        )
    wide = POINTS.double()
    eps = torch.finfo(torch.float32).eps
    # A few units in the last place, or twice what torch itself errs. The floors: far to the left even float64 has no
    # digits of 1 + erf(x) and 1 + tanh(x); where a slope passes through zero it is a difference of rounded numbers.
    for ours, exact, plain, floor in (
        (y, get_activation(name)(wide), get_activation(name)(POINTS), 1e-14),
        (
            slope,
            get_activation_backward(name)(wide.new_ones(wide.shape), wide),
            get_activation_backward(name)(torch.ones_like(POINTS), POINTS),
            eps / 2,
        ),
    ):
        error, of_torch = ((found.squeeze().double() - exact).abs() for found in (ours, plain))
        allowed = 16 * eps * exact.abs() + 2 * of_torch + floor
        worst = (error - allowed).argmax()
        assert bool((error <= allowed).all()), (name, float(POINTS[worst]), float(error[worst]), float(exact[worst]))
