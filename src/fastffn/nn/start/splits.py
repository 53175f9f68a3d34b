"""Decisions that part tokens by what they need: the nodes of trees, from tokens."""

from __future__ import annotations

import torch

from fastffn.nn.start.least_squares import covariance


def split(inputs: torch.Tensor, needs: torch.Tensor, common: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A decision `<x, w> + b >= 0` that parts tokens in halves, as unlike each other as a linear one can make them.

    Args:
        inputs: `[n, D]`, the tokens that arrive at the node.
        needs: `[n, m]`, what sets them apart.
        common: `[D, D]`, the covariance of all tokens: a guide where few arrive.

    Returns:
        `w [D]` and `b []`, in float32; scores have the deviation 1 and the median 0. With the regression of `needs` on
        `inputs` in mind: of all directions the one along which most of what can be told varies.
    """
    count, width = inputs.shape
    if not count:
        return inputs.new_zeros(width), inputs.new_zeros(())
    centred, wanted = inputs - inputs.mean(0), needs - needs.mean(0)
    trust = count / (count + width)
    c = trust * covariance(inputs, centred=True) + (1 - trust) * common
    told = torch.linalg.solve(c, (centred.T @ wanted).double() / count)  # [D, m]
    fitted = centred.double() @ told
    direction = torch.linalg.eigh(fitted.T @ fitted).eigenvectors[:, -1]
    weight = (told @ direction).float()
    scores = inputs @ weight
    deviation = scores.std(correction=0).clamp_min(torch.finfo(scores.dtype).tiny)
    return weight / deviation, -scores.median() / deviation
