"""Ways through a tree of decisions: which leaf a token ends at, by the scores of the nodes on its path.

Node j has the children 2j + 1 (left) and 2j + 2 (right); right where its score is at least 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# On the way down the scores of this many levels come from one product with all their nodes, in shapes that matrix
# units like; below, each token fetches its own node.
DENSE_LEVELS = 5
# Tokens that fetch their nodes together.
PIECE = 256


class Path(NamedTuple):
    """How tokens went through a tree.

    Attributes:
        leaf: `[T]`, the leaf where each ended.
        nodes: `[T, depth]`, the nodes it visited.
        turned: `[T, depth]`, whether the decision was turned round by a region leak; None if none was.
    """

    leaf: torch.Tensor
    nodes: torch.Tensor
    turned: torch.Tensor | None


def top_scores(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, depth: int) -> torch.Tensor:
    """The scores of all nodes of the first levels: `[T, D]` to `[T, 2^levels - 1]`."""
    levels = min(depth, DENSE_LEVELS)
    nodes = 2**levels - 1
    if x.is_meta and nodes:
        # FLOPs are counted so: a token needs one node of each level; all of them are a faster way to that.
        return F.linear(x, weight[:levels], bias[:levels])[:, :1].expand(-1, nodes)
    return F.linear(x, weight[:nodes], bias[:nodes])


@torch.no_grad()
def descend(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top: torch.Tensor, depth: int, leak: float = 0.0
) -> Path:
    """The ways of tokens `[T, D]` down, `top` being their `top_scores`; `leak` turns decisions round."""
    turned = torch.rand(x.shape[0], depth, device=x.device) < leak if leak else None
    node = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    nodes = []
    for level in range(depth):
        nodes.append(node)
        if level < DENSE_LEVELS:
            score = top.gather(1, node.unsqueeze(1)).squeeze(1)
        else:
            score = _scores_of(x, node, weight, bias)
        # What is not a number goes left.
        right = score >= 0
        if turned is not None:
            right = right ^ turned[:, level]
        node = 2 * node + 1 + right
    visited = torch.stack(nodes, 1) if nodes else node.unsqueeze(1)[:, :0]
    return Path(node - (2**depth - 1), visited, turned)


def visited_scores(
    x: torch.Tensor, path: Path, weight: torch.Tensor, bias: torch.Tensor, top: torch.Tensor
) -> torch.Tensor:
    """The scores of the nodes on a path, `[T, depth]`, with gradients; those of turned decisions have their sign."""
    scores = top.gather(1, path.nodes[:, :DENSE_LEVELS])
    if path.nodes.shape[1] > DENSE_LEVELS:
        scores = torch.cat((scores, _PathScores.apply(x, path.nodes[:, DENSE_LEVELS:], weight, bias)), 1)
    if path.turned is not None:
        scores = torch.where(path.turned, -scores, scores)
    return scores


class _PathScores(torch.autograd.Function):
    """The scores of given nodes of each token: `[T, k]`.

    Keeps no copy of the nodes' weights for each token. The gradient of the weights is summed like that of an
    embedding, in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, nodes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, nodes, weight)
        return torch.stack([_scores_of(x, node, weight, bias) for node in nodes.unbind(1)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, nodes, weight = ctx.saved_tensors
        of_x, of_weight = torch.zeros_like(x), torch.zeros_like(weight)
        for node, own in zip(nodes.unbind(1), gradient.unbind(1), strict=True):
            of_x += own.unsqueeze(1) * weight[node]
            of_weight += _sum_by_node(own.unsqueeze(1) * x, node, len(weight))
        of_bias = _sum_by_node(gradient.reshape(-1, 1), nodes.flatten(), len(weight)).squeeze(1)
        return of_x, None, of_weight, of_bias


def _scores_of(x: torch.Tensor, node: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The score of each token's own node: `[T, D]`, `[T]` to `[T]`."""
    if torch.compiler.is_compiling() or x.is_meta:
        return (x * weight[node]).sum(1) + bias[node]
    # In pieces that stay in the cache.
    pieces = zip(x.split(PIECE), node.split(PIECE), strict=True)
    return torch.cat([(rows * weight[own]).sum(1) for rows, own in pieces]) + bias[node]


def _sum_by_node(rows: torch.Tensor, node: torch.Tensor, nodes: int) -> torch.Tensor:
    summed: torch.Tensor = torch.ops.aten.embedding_dense_backward(rows, node, nodes, -1, False)
    return summed


def binary_entropy(scores: torch.Tensor) -> torch.Tensor:
    """The entropy of a decision whose one side has the weight sigmoid(score), in nats."""
    return F.softplus(scores) - scores * torch.sigmoid(scores)


def walk(scores: torch.Tensor, depth: int) -> torch.Tensor:
    """The leaf of each token, from the scores of all nodes `[T, N]`."""
    node = torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    for _ in range(depth):
        node = 2 * node + 1 + (scores.gather(1, node.unsqueeze(1)).squeeze(1) >= 0)
    return node - scores.shape[1]
