from __future__ import annotations

import pytest
import torch

from fastffn.nn.start.router import fit_router


def chosen(weight: torch.Tensor, x: torch.Tensor, active: int) -> torch.Tensor:
    return (x @ weight.T).topk(active, dim=1).indices.sort(1).values


@pytest.mark.parametrize("active", [1, 3])
def test_finds_planted_gains(active: int) -> None:
    true = torch.randn(8, 20)
    x = torch.randn(3000, 20)
    # Inputs differ in size.
    size = torch.logspace(-3, 3, 20)
    x, true = x * size, true / size
    gain = (2 * x @ true.T / 20**0.5).exp()
    found = fit_router(x[:2000], gain[:2000], active)
    held_out, best = gain[2000:], gain[2000:].topk(active, 1).values.sum(1)
    reached = held_out.gather(1, chosen(found, x[2000:], active)).sum(1)
    assert float(reached.sum() / best.sum()) > 0.95
    assert torch.equal(found, fit_router(x[:2000], gain[:2000], active))


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens(tokens: int) -> None:
    x, gain = torch.randn(tokens, 6), torch.rand(tokens, 4)
    found = fit_router(x, gain, 1)
    assert torch.equal(chosen(found, x, 1)[:, 0], gain.argmax(1))


@pytest.mark.parametrize("case", ["no gain", "every group alike", "inputs of zero", "constant inputs"])
def test_nothing_to_learn(case: str) -> None:
    x, gain = torch.randn(50, 6), torch.rand(50, 4)
    if case == "no gain":
        gain.zero_()
    elif case == "every group alike":
        gain.fill_(0.3)
    else:
        x[:] = 0.0 if case == "inputs of zero" else x[0].clone()
    assert fit_router(x, gain, 2).isfinite().all()
