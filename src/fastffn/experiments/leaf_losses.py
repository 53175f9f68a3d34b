"""A leaf tree trained on the losses of its leaves: what is evaluated later is one leaf, so each must be right alone.

    soft training     loss(sum over l of m_l leaf_l(x), y) + auxiliary       leaves may correct each other
    here              sum over l of m_l loss(leaf_l(x), y) + auxiliary       they may not

m_l is the weight of leaf l for x. Jordan and Jacobs' hierarchies of experts are trained much like this (1994), as are
soft decision trees (Frosst and Hinton, arXiv 1711.09784). It takes a loss for the output of a single FFN, and memory
for all leaves' outputs: for a classifier, not for an FFN inside a Transformer.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastffn.nn.leaf_tree import LeafTreeFFN
from fastffn.nn.usage import occurrences
from fastffn.ops.activations import get_activation
from fastffn.ops.leaf_mixture.reference import path_weights


def leaf_outputs(ffn: LeafTreeFFN, x: torch.Tensor) -> torch.Tensor:
    """What each leaf says, the shared part included: `[T, D]` to `[T, L, O]`, with gradients."""
    hidden = F.linear(x, ffn.leaf_up_weight.flatten(0, 1), ffn.leaf_up_bias.flatten())
    hidden = get_activation(ffn.config.activation)(hidden).unflatten(1, ffn.leaf_up_bias.shape)
    y = torch.bmm(hidden.transpose(0, 1), ffn.leaf_down_weight.transpose(1, 2)).transpose(0, 1) + ffn.leaf_down_bias
    return y if ffn.shared is None else y + ffn.shared(x).unsqueeze(1)


def leaf_losses(ffn: LeafTreeFFN, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mixture of the leaves' cross-entropies, and the auxiliary losses that soft training has.

    Args:
        ffn: a leaf tree whose outputs are logits of classes.
        x: `[T, D]`.
        labels: `[T]`.
    """
    config, scores, y = ffn.config, ffn.node_scores(x), leaf_outputs(ffn, x)
    if config.region_leak:
        # 1 - sigmoid(s) is sigmoid(-s): a decision is turned round by its score's sign.
        scores = torch.where(torch.rand_like(scores) < config.region_leak, -scores, scores)
    weights = path_weights(scores)
    wrong = F.cross_entropy(y.flatten(0, 1), labels.repeat_interleave(config.leaves), reduction="none")
    loss = (weights * wrong.view_as(weights)).sum(1).mean()
    if config.hardening_weight:
        loss = loss + config.hardening_weight * ffn.node_entropies(x).mean()
    if config.balance_weight:
        share = occurrences(ffn.path(x).leaf, config.leaves).to(weights.dtype) / len(x)
        loss = loss + config.balance_weight * config.leaves * (share * weights.mean(0)).sum()
    return loss
