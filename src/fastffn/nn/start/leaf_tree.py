"""A leaf tree out of a dense FFN: tokens are parted by the neurons that they use, each leaf gets its tokens' neurons.

    1. the neurons that do most for all tokens go into the shared part
    2. from the root down, each node parts its tokens in halves that use different neurons (`splits`)
    3. a leaf gets copies of the neurons that do most for its tokens; one neuron may be in many leaves
    4. its weights out of them are fitted to what the shared part leaves over on its tokens

Leaves that hold all neurons reproduce the dense output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastffn.nn.dense import DenseFFN
from fastffn.nn.start.least_squares import for_few, refit_with_bias
from fastffn.nn.start.neurons import SKETCH, by_use, columns, contributions, copy_neurons
from fastffn.nn.start.splits import Splitter

if TYPE_CHECKING:
    from fastffn.nn.leaf_tree import LeafTreeFFN

# Deviation of a decision's score: most tokens go one way with a weight of over 0.9, in soft training too.
FIRMNESS = 5.0


@torch.no_grad()
def start_leaf_tree(tree: LeafTreeFFN, dense: DenseFFN, inputs: torch.Tensor) -> None:
    """Sets the weights of `tree` from `dense` and tokens `[S, D]`."""
    config = tree.config
    assert config.leaf_width is not None
    hidden = dense.hidden(inputs)
    wanted = dense.down(hidden)
    contribution = contributions(dense, hidden)
    order = by_use(contribution)
    shared, rest = order[: config.shared], order[config.shared :]
    if tree.shared is not None:
        copy_neurons(dense, tree.shared, shared)
        wanted = wanted - tree.shared(inputs)

    generator = torch.Generator().manual_seed(0)
    mixtures = torch.randn(len(rest), SKETCH, generator=generator) / len(rest) ** 0.5
    arrived = _part(tree, inputs, contribution[:, rest] @ mixtures)

    for leaf, own in enumerate(arrived):
        # A leaf where no token arrives is made for all.
        tokens = own if len(own) else torch.arange(len(inputs))
        chosen = rest[by_use(contribution[tokens][:, rest])[: config.leaf_width]].sort().values
        # Neurons that are not there fill up the leaf.
        chosen = torch.cat((chosen, chosen.new_full((config.leaf_width - len(chosen),), len(order))))
        for name in ("up", "gate") if config.gated else ("up",):
            linear = getattr(dense, name)
            getattr(tree, f"leaf_{name}_weight")[leaf] = columns(linear.weight.T, chosen).T
            bias = torch.zeros(config.leaf_width) if linear.bias is None else columns(linear.bias[None], chosen)[0]
            getattr(tree, f"leaf_{name}_bias")[leaf] = bias
        features = columns(hidden[tokens], chosen)
        weight, bias = refit_with_bias(features, wanted[tokens], columns(dense.down.weight, chosen), for_few(features))
        tree.leaf_down_weight[leaf], tree.leaf_down_bias[leaf] = weight, bias


def _part(tree: LeafTreeFFN, inputs: torch.Tensor, needs: torch.Tensor) -> list[torch.Tensor]:
    """Sets the decisions; the numbers of the tokens that arrive at each leaf."""
    split = Splitter(inputs)
    level = [torch.arange(len(inputs))]
    node = 0
    for _ in range(tree.config.depth):
        below = []
        for tokens in level:
            weight, bias, _ = split(tokens, needs[tokens])
            tree.node_weight[node], tree.node_bias[node] = FIRMNESS * weight, FIRMNESS * bias
            right = inputs[tokens] @ tree.node_weight[node] + tree.node_bias[node] >= 0
            below += [tokens[~right], tokens[right]]
            node += 1
        level = below
    return level
