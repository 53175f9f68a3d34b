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


def covariance(rows: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """`C [n, n]` of rows `[S, n]`, with its ridge, in float64."""
    rows = rows.detach().float()
    if centred:
        rows = rows - rows.mean(0)
    return with_ridge((rows.T @ rows).double() / max(len(rows), 1))


def with_ridge(covariance: torch.Tensor) -> torch.Tensor:
    """`covariance [n, n]` with its ridge."""
    own = covariance.diagonal()
    return covariance + torch.diag(RIDGE * own + FLOOR * own.mean().clamp_min(torch.finfo(own.dtype).tiny))


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


def refit(features: torch.Tensor, targets: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The linear map `M [O, n]` from features `[S, n]` to targets `[S, O]` nearest to a start `[O, n]`, in float64.

    What `start` leaves over is explained by a ridge regression, so an exact start stays as it is.
    """
    features, start = features.detach().float(), start.detach()
    left = targets.detach().float() - features @ start.float().T
    count = max(len(features), 1)
    change = torch.linalg.solve(
        with_ridge((features.T @ features).double() / count), (features.T @ left).double() / count
    )
    return start.double() + change.T
