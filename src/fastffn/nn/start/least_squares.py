"""Linear maps fitted to what they meet.

    covariance C = mean of x x^T over tokens x (centred where a bias can take up the mean), plus a ridge
    factors      the b, a of rank r nearest to W where it matters: || (W - b a) C^(1/2) ||
    refit        the M nearest to targets, || M f - t ||^2, that leaves a given start only where the tokens say so

The ridge is relative to each input's own variance: some inputs of a Transformer are a thousand times larger than
others, and a common ridge would drown all of those.
"""

from __future__ import annotations

import torch

# Part of each input's variance that is added to its own: a few thousand tokens do not tell correlations exactly.
RIDGE = 0.1
# Of the mean variance: for inputs that never vary.
FLOOR = 1e-8
# Of a mean in float32, relative to it.
ROUNDING = 1e-6


def without_mean(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[S, n]` without their mean, and the mean `[n]`; at least one row."""
    mean = rows.mean(0)
    rest = rows - mean
    # What is left of a constant is rounding; a regression would take it for a signal.
    constant = rest.abs().amax(0) <= ROUNDING * mean.abs()
    return rest.masked_fill(constant, 0.0), mean


def covariance(rows: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """`C [n, n]` of rows `[S, n]`, with its ridge, in float64."""
    rows = rows.detach().float()
    if centred:
        rows, _ = without_mean(rows)
    return with_ridge((rows.T @ rows).double() / max(len(rows), 1))


def with_ridge(covariance: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """`covariance [n, n]` with its ridge."""
    own = covariance.diagonal()
    return covariance + torch.diag(ridge * own + FLOOR * own.mean().clamp_min(torch.finfo(torch.float32).tiny))


def weighted_factors(weight: torch.Tensor, rank: int, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `b @ a` of a rank for `weight [..., out, in]` on inputs of that covariance `[..., in, in]`.

    Returns:
        `a [..., rank, in]` and `b [..., out, rank]`, of equal norms on such inputs; both in float64.
    """
    # With C = L L^T the norm is that of (W - b a) L: a truncated SVD of W L, by way of its smaller Gram matrix.
    weight = weight.detach().double()
    root = torch.linalg.cholesky(covariance)
    product = weight @ root
    wide = product.shape[-2] <= product.shape[-1]
    gram = product @ product.mT if wide else product.mT @ product
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)
    scale = values.clamp_min(torch.finfo(values.dtype).tiny) ** 0.25  # the root of a singular value
    if wide:
        return (vectors.mT @ weight) / scale[..., :, None], vectors * scale[..., None, :]
    a = torch.linalg.solve_triangular(root, vectors.mT, upper=False, left=False)
    return a * scale[..., :, None], (product @ vectors) / scale[..., None, :]


def refit(features: torch.Tensor, targets: torch.Tensor, start: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """The linear map `M [O, n]` from features `[S, n]` to targets `[S, O]` nearest to a start `[O, n]`, in float64.

    What `start` leaves over is explained by a ridge regression, so an exact start stays as it is. `ridge` is relative
    to each feature's own mean square; `for_few` gives one that grows where tokens are few.
    """
    features, start = features.detach().float(), start.detach()
    left = targets.detach().float() - features @ start.float().T
    count = max(len(features), 1)
    gram = with_ridge((features.T @ features).double() / count, ridge)
    change = torch.linalg.solve(gram, (features.T @ left).double() / count)
    return start.double() + change.T


def for_few(features: torch.Tensor) -> float:
    """A ridge for `refit` on these features `[S, n]`: the fewer tokens for each, the larger.

    Where neurons were chosen by the same tokens, RIDGE alone explains these well and others badly.
    """
    tokens, width = features.shape
    return RIDGE + 2 * width / max(tokens, 1)


def refit_with_bias(
    features: torch.Tensor, targets: torch.Tensor, start: torch.Tensor, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """`refit`, with a bias `[O]` that takes up what the means leave over; at least one row."""
    rest, mean = without_mean(features)
    left, wanted = without_mean(targets)
    weight = refit(rest, left, start, ridge)
    return weight, wanted.double() - weight @ mean.double()
