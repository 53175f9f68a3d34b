"""Decisions that part tokens by what they need: the nodes of trees, from tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastffn.nn.start.least_squares import ROUNDING, covariance, without_mean


class Decision(NamedTuple):
    """`<x, weight> + bias >= 0`, in float32.

    Attributes:
        weight: `[D]`.
        bias: `[]`.
        scores: `[n]`, of the tokens it was made for; their deviation is 1, half of them are below 0.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scores: torch.Tensor


class Splitter:
    """Makes decisions that part tokens in halves, as unlike each other as a linear decision can make them.

    Args:
        inputs: `[S, D]`, all tokens; at least one.

    The regression of what tokens need on their inputs takes the covariance of all tokens at every node: the few that
    arrive deep in a tree do not tell one, and trees with covariances of each node's own were worse and slower.
    """

    def __init__(self, inputs: torch.Tensor) -> None:
        root = torch.linalg.cholesky(covariance(inputs, centred=True))
        identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
        self.unroot = torch.linalg.solve_triangular(root, identity, upper=False).T
        rows, self.mean = without_mean(inputs)
        # [S, D], uncorrelated and of variance 1 (but for the ridge): a regression on them is a mere product.
        self.white = rows @ self.unroot.float()

    def __call__(self, tokens: torch.Tensor, needs: torch.Tensor) -> Decision:
        """A decision for the tokens that arrive at a node.

        Args:
            tokens: `[n]`, their numbers.
            needs: `[n, m]`, what sets them apart.

        Returns:
            Of all directions the one along which most of what can be told varies; zeros where nothing can be told.
        """
        if not len(tokens):
            return self._nothing(tokens)
        rows = self.white[tokens]
        wanted, _ = without_mean(needs)
        told = rows.T @ wanted / len(tokens)  # [D, m]
        fitted = rows @ told
        fitted -= fitted.mean(0)
        direction = told @ torch.linalg.eigh((fitted.T @ fitted).double()).eigenvectors[:, -1].float()
        scores = rows @ direction
        deviation = scores.std(correction=0)
        if not deviation > ROUNDING * scores.abs().max():
            return self._nothing(tokens)
        weight = self.unroot @ (direction / deviation).double()
        # Between the two in the middle: a token on the threshold would go another way with each rounding.
        ordered = scores.sort().values
        half = len(ordered) // 2
        middle = (ordered[half - 1] + ordered[half]) / 2 / deviation
        bias = -self.mean.double() @ weight - middle
        return Decision(weight.float(), bias.float(), scores / deviation - middle)

    def _nothing(self, tokens: torch.Tensor) -> Decision:
        return Decision(torch.zeros_like(self.mean), self.mean.new_zeros(()), self.mean.new_zeros(len(tokens)))
