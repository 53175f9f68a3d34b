"""Trees of neurons out of a dense FFN: there is nothing to copy into them, so they are taught.

1. the neurons that do most for all tokens go into the shared part
2. tree after tree, node after node: a neuron in the direction that tells most about what is left over on the
   tokens that arrive, with the weights out that explain most of it
3. all weights together are trained on the dense FFN's outputs, for a few seconds
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fastffn.nn.dense import DenseFFN
from fastffn.nn.start.least_squares import RIDGE
from fastffn.nn.start.neurons import by_use, contributions, copy_neurons
from fastffn.nn.start.splits import Splitter
from fastffn.ops.activations import get_activation

if TYPE_CHECKING:
    from fastffn.nn.neuron_tree import NeuronTreeFFN

STEPS = 150
BATCH = 512
RATE = 4e-3
# Outputs of neurons are told apart by this many mixtures of them.
MIXTURES = 16
# A neuron's direction is fitted to the tokens that its weights out are then fitted to: these are made smaller, by half
# where 10 D tokens arrive, and the fewer the more.
DOUBT = 10.0


@torch.no_grad()
def start_neuron_tree(ffn: NeuronTreeFFN, dense: DenseFFN, inputs: torch.Tensor) -> None:
    """Sets the weights of `ffn` from `dense` and tokens `[S, D]`."""
    hidden = dense.hidden(inputs)
    wanted = dense.down(hidden)
    left = wanted
    if ffn.shared is not None:
        copy_neurons(dense, ffn.shared, by_use(contributions(dense, hidden))[: ffn.config.shared])
        ffn.shared.down.bias.copy_((wanted - ffn.shared(inputs)).mean(0))
        left = wanted - ffn.shared(inputs)
    split = Splitter(inputs)
    for tree in range(ffn.config.trees):
        left = _grow(ffn, tree, inputs, left, split)
    _train(ffn, inputs, wanted)


def _grow(ffn: NeuronTreeFFN, tree: int, inputs: torch.Tensor, left: torch.Tensor, split: Splitter) -> torch.Tensor:
    """Sets the nodes of one tree; what is then left over, `[S, O]`."""
    act = get_activation(ffn.config.activation)
    generator = torch.Generator().manual_seed(tree)
    left = left.clone()
    level = [torch.arange(len(left))]
    node = 0
    for depth in range(ffn.config.depth + 1):
        below = []
        for tokens in level:
            mixtures = torch.randn(left.shape[1], MIXTURES, generator=generator)
            own = left[tokens]
            weight, bias, scores = split(tokens, own @ mixtures)
            if weight.any():
                ffn.w_in[tree, node], ffn.b_in[tree, node] = weight, bias
            else:
                # The direction that was drawn stays: a neuron of zeros would never learn.
                scores = inputs[tokens] @ ffn.w_in[tree, node] + ffn.b_in[tree, node]
            active = act(scores)
            size = active.square().sum().clamp_min(torch.finfo(active.dtype).tiny)
            doubt = RIDGE + DOUBT * ffn.w_in.shape[2] / max(len(tokens), 1)
            ffn.w_out[tree, node] = active @ own / (size * (1 + doubt))
            left[tokens] = own - active[:, None] * ffn.w_out[tree, node]
            if depth < ffn.config.depth:
                below += [tokens[scores <= 0], tokens[scores > 0]]
            node += 1
        level = below
    return left


def _train(ffn: NeuronTreeFFN, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = wanted.square().mean().clamp_min(1e-12)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        optimizer = torch.optim.Adam(ffn.parameters(), lr=RATE)
        for step in range(STEPS):
            chosen = torch.randint(len(inputs), (min(BATCH, len(inputs)),), generator=generator)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            (F.mse_loss(ffn(inputs[chosen]), wanted[chosen]) / scale).backward()
            optimizer.step()
    ffn.zero_grad()
