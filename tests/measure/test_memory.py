from __future__ import annotations

import torch

from fastffn.measure.memory import peak_bytes

CPU = torch.device("cpu")
MB = 4 * 2**18


def test_counts_what_lives_at_once() -> None:
    def run() -> None:
        a = torch.ones(2**18)
        b = a + 1
        del a
        b * 2

    assert peak_bytes(run, CPU) == 2 * MB


def test_views_and_in_place_cost_nothing() -> None:
    held = torch.ones(2**18)

    def run() -> None:
        held.view(2**9, 2**9).T.add_(1)

    assert peak_bytes(run, CPU) == 0


def test_activations_kept_for_the_backward_pass_count() -> None:
    weight = torch.ones(2**18, requires_grad=True)

    def run() -> None:
        y = (weight * 2).exp().exp()
        y.sum().backward()
        weight.grad = None

    # Product, two exponentials (both kept for their gradients), a gradient and the next one.
    assert 4 * MB <= peak_bytes(run, CPU) <= 5 * MB + 100
