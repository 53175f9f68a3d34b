from __future__ import annotations

import pytest
import torch

from fastffn.nn.start.least_squares import RIDGE, covariance, refit, weighted_factors


def uneven(tokens: int, width: int) -> torch.Tensor:
    """Rows whose inputs hang together and differ in size by orders of magnitude."""
    mixed = torch.randn(tokens, width) @ torch.randn(width, width)
    return mixed * torch.logspace(-2, 1, width)


def test_covariance_has_a_ridge_relative_to_each_input() -> None:
    rows = uneven(500, 6) + 3
    wanted = torch.cov(rows.double().T, correction=0)
    found = covariance(rows, centred=True)
    own = wanted.diagonal()
    # Sums in float32, of inputs a thousand times larger than others.
    torch.testing.assert_close(found - torch.diag(found.diagonal() - own), wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.diagonal(), own * (1 + RIDGE), rtol=1e-2, atol=1e-5)
    assert torch.linalg.eigvalsh(covariance(torch.zeros(3, 4), centred=False)).min() > 0


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9), (3, 5, 8)])
@pytest.mark.parametrize("rank", [1, 4])
def test_no_factors_are_better_on_such_inputs(shape: tuple[int, ...], rank: int) -> None:
    if rank > min(shape[-2:]):
        rank = min(shape[-2:])
    weight = torch.randn(shape, dtype=torch.float64)
    c = covariance(uneven(400, shape[-1]), centred=False)
    a, b = weighted_factors(weight, rank, c)
    root = torch.linalg.cholesky(c)
    # Eckart, Young and Mirsky: what the best approximation of W L leaves over.
    left_over = torch.linalg.svdvals(weight @ root)[..., rank:].square().sum(-1)
    torch.testing.assert_close(((weight - b @ a) @ root).square().sum((-2, -1)), left_over, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((a @ root).square().sum(-1), b.square().sum(-2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_full_rank_is_exact(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    a, b = weighted_factors(weight, 4, covariance(uneven(5, shape[1]), centred=True))
    torch.testing.assert_close((b @ a).float(), weight, rtol=1e-5, atol=1e-5)


def test_refit_leaves_an_exact_start_and_mends_another() -> None:
    features, true = uneven(2000, 6), torch.randn(3, 6)
    targets = features @ true.T
    torch.testing.assert_close(refit(features, targets, true).float(), true, rtol=1e-4, atol=1e-4)
    start = true + 0.3 * torch.randn(3, 6)
    mended = refit(features, targets, start).float()
    assert (features @ (mended - true).T).norm() < 0.2 * (features @ (start - true).T).norm()


def test_refit_leaves_alone_what_no_token_shows() -> None:
    features, start = torch.randn(100, 4), torch.randn(2, 4)
    features[:, 2] = 0
    mended = refit(features, torch.randn(100, 2), start).float()
    torch.testing.assert_close(mended[:, 2], start[:, 2])
    assert not torch.allclose(mended[:, 0], start[:, 0])
