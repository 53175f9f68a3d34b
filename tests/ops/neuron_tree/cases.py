"""Random trees and tokens, and which of the tokens have no decision within rounding of a tie."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastffn.ops.neuron_tree import reference
from fastffn.ops.neuron_tree.request import accumulation_dtype


class Case(NamedTuple):
    x: torch.Tensor
    w_in: torch.Tensor
    b_in: torch.Tensor | None
    w_out: torch.Tensor
    activation: str
    straight_through: bool = False

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in self))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in self if isinstance(t, torch.Tensor)]


def make(
    tokens: int,
    *,
    d_model: int = 9,
    d_out: int = 7,
    depth: int = 3,
    trees: int = 2,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    activation: str = "gelu",
    straight_through: bool = False,
    strided: bool = False,
    seed: int = 0,
) -> Case:
    random = torch.Generator().manual_seed(seed)
    nodes = 2 ** (depth + 1) - 1

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=random)).to(dtype)

    x = draw(d_model, tokens).T if strided else draw(tokens, d_model)
    w_in = draw(trees, nodes, d_model, scale=d_model**-0.5)
    w_out = draw(trees, nodes, d_out, scale=((depth + 1) * trees) ** -0.5)
    return Case(x, w_in, draw(trees, nodes, scale=0.3) if bias else None, w_out, activation, straight_through)


def exact(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, scores and last nodes in float64."""
    return reference.neuron_tree(*case.to(torch.float64))


def clear(case: Case) -> torch.Tensor:
    """`[P, T]`: whether no score of a token in a tree is within what the dtype can round to the other side of zero.

    A score is a sum, in float32 at least, of products that are of order one, and may be rounded once to the dtype, by
    half its epsilon, before the bias is added. Those of the lowest level decide nothing, but relu has another slope on
    either side.
    """
    _, scores, _ = exact(case)
    rounded, summed = (torch.finfo(dtype).eps for dtype in (case.x.dtype, accumulation_dtype(case.x.dtype)))
    margin = (2 * rounded + 8 * summed) * max(1.0, float(scores.abs().amax()) if scores.numel() else 1.0)
    return (scores.abs() > margin).all(-1)
