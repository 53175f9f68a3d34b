"""What the backends of `neuron_tree` look at to decide whether a call is theirs; and the arithmetic of a full tree.

Nodes are numbered by levels: node n has children 2n + 1 and 2n + 2, level l holds the nodes `2**l - 1 .. 2**(l+1) - 2`.
So `n + 1` written in binary is a leading one followed by the decisions that lead to n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# So that numbers of nodes fit 32 bits in every kernel.
MAX_DEPTH = 30


class Request(NamedTuple):
    """A call: T tokens of width D through P trees of `depth + 1` levels, to width O."""

    device: str
    dtype: torch.dtype
    tokens: int
    trees: int
    depth: int
    d_model: int
    d_out: int

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens through {self.trees}x{self.depth}, {self.d_model} to {self.d_out}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        )


def request_of(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_out: torch.Tensor,
    activation: str,
    straight_through: bool,
) -> Request:
    """The request that these tensors make; x is `[T, D]`."""
    trees, neurons, d_model = w_in.shape
    return Request(x.device.type, x.dtype, x.shape[0], trees, depth_of(neurons), d_model, w_out.shape[2])


def neurons_of(depth: int) -> int:
    """Number N of nodes of a full tree of `depth + 1` levels."""
    return 2 ** (depth + 1) - 1


def depth_of(neurons: int) -> int:
    """The depth of the smallest full tree with at least that many nodes."""
    # While tracing the number may be a symbol: the tree's shape is then taken as fixed.
    return max(int(neurons).bit_length() - 1, 0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def path_to(last: torch.Tensor, levels: int) -> torch.Tensor:
    """All nodes from the root down to the nodes `last` (of any shape) on the lowest level: `[..., levels]`."""
    shifts = torch.arange(levels - 1, -1, -1, device=last.device)
    return ((last + 1).unsqueeze(-1) >> shifts) - 1
