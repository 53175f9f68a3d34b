"""A tree whose every score is known: the path that a token takes, and from it the mask. Used by the dense product of
all neurons, and by the small ones of `torch_grouped`.

Masks are never multiplied with: what a token did not visit is not computed on, so an infinite score of a node off the
path harms nobody.
"""

from __future__ import annotations

import torch

# Scores held at once. Large enough that products run at full speed for any tree of less than 2**18 nodes.
CHUNK_ELEMENTS = 2**24


def tokens_of_chunk(neurons: int) -> int:
    """Tokens whose scores of so many neurons are held at once."""
    return max(16, CHUNK_ELEMENTS // neurons)


def descend(scores: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nodes that are visited, and their scores.

    Args:
        scores: `[..., 2**levels - 1]` of all nodes of a tree.

    Returns:
        Numbers of the visited nodes and their scores, both `[..., levels]`.
    """
    node = torch.zeros((*scores.shape[:-1], 1), dtype=torch.int64, device=scores.device)
    nodes, visited = [node], [scores[..., :1]]
    for _ in range(levels - 1):
        node = 2 * node + 1 + (visited[-1] > 0)
        nodes.append(node)
        visited.append(scores.gather(-1, node))
    return torch.cat(nodes, -1), torch.cat(visited, -1)


def spread(values: torch.Tensor, nodes: torch.Tensor, neurons: int, dtype: torch.dtype) -> torch.Tensor:
    """`[..., neurons]` with the `values` `[..., levels]` at the visited nodes, and zero elsewhere."""
    result = torch.zeros((*values.shape[:-1], neurons), dtype=dtype, device=values.device)
    return result.scatter_(-1, nodes, values.to(dtype))
