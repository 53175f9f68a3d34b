"""Leaf trees to test, and what each leaf and each path is by the plainest code."""

from __future__ import annotations

import torch

import fastffn
from fastffn import LeafTreeConfig, LeafTreeFFN


def tree(**fields) -> LeafTreeFFN:
    return LeafTreeFFN(LeafTreeConfig(**({"d_model": 6, "depth": 2, "leaf_width": 3} | fields)))


def leaf_outputs(ffn: LeafTreeFFN, x: torch.Tensor) -> torch.Tensor:
    """Every leaf's output for every token, `[T, L, O]`: nothing of this is in the library."""
    act = fastffn.ops.activations.get_activation(ffn.config.activation)
    hidden = torch.einsum("td,lwd->tlw", x, ffn.leaf_up_weight) + ffn.leaf_up_bias
    if ffn.config.gated:
        hidden = act(torch.einsum("td,lwd->tlw", x, ffn.leaf_gate_weight) + ffn.leaf_gate_bias) * hidden
    else:
        hidden = act(hidden)
    return torch.einsum("tlw,low->tlo", hidden, ffn.leaf_down_weight) + ffn.leaf_down_bias


@torch.no_grad()
def one_path(ffn: LeafTreeFFN, x: torch.Tensor) -> list[tuple[int, float]]:
    """`(leaf, least |score| on the way)` of each token, one after the other."""
    found = []
    for row in x:
        node, nearest = 0, float("inf")
        for _ in range(ffn.config.depth):
            score = float(row.double() @ ffn.node_weight[node].double() + ffn.node_bias[node].double())
            nearest = min(nearest, abs(score))
            node = 2 * node + 1 + (score >= 0)
        found.append((node - (ffn.config.leaves - 1), nearest))
    return found
