"""Weights of the published package `fastfeedforward` (class `FFF`, arXiv 2308.14711) into `leaf_tree`, and back.

The two published classes are both called `FFF`; their state dicts tell them apart:

    leaf tree    fastfeedforward 0.2.1     node_weights [N, D], node_biases [N, 1], w1s [L, D, W], b1s [L, W],
                                           w2s [L, W, O], b2s [L, O], depth, and perhaps node_usage, leaf_usage
    neuron tree  UltraFastBERT, training   linear_in.weight, linear_in.bias, linear_out.weight
                 UltraFastBERT, benchmark  w1s, w2s of two dimensions
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastffn.errors import CheckpointError
from fastffn.nn.leaf_tree import LeafTreeConfig, LeafTreeFFN
from fastffn.nn.usage import counts_of

WEIGHTS = ("node_weights", "node_biases", "w1s", "b1s", "w2s", "b2s")
OTHERS = ("depth", "node_usage", "leaf_usage")


def published_kind(state: Mapping[str, torch.Tensor]) -> str | None:
    """The kind that a state dict of a published class `FFF` belongs to: `leaf_tree`, `neuron_tree`, or None."""
    if "node_weights" in state:
        return "leaf_tree"
    matrices = [state.get(name) for name in ("w1s", "w2s")]
    if any(name.startswith(("linear_in.", "linear_out.")) for name in state) or all(
        matrix is not None and matrix.dim() == 2 for matrix in matrices
    ):
        return "neuron_tree"
    return None


def load_published(state: Mapping[str, torch.Tensor], *, activation: str = "relu", **fields: Any) -> LeafTreeFFN:
    """A `LeafTreeFFN` with the weights of a `fastfeedforward.FFF`.

    Args:
        state: its `state_dict()`. `node_usage` is left aside: those counts are no shares of tokens. `leaf_usage` is
            rounded into our counts.
        activation: what it was built with; the state dict does not say. The package's default is ReLU.
        fields: further fields of `LeafTreeConfig`, such as `region_leak`.

    Returns:
        A module in training mode, its parameters copies.

    Raises:
        CheckpointError: the state dict belongs to the other class of that name or to none, tensors are missing or
            unknown, or their shapes do not fit together.
    """
    kind = published_kind(state)
    if kind == "neuron_tree":
        raise CheckpointError(
            f"This state dict ({_names(state)}) is of UltraFastBERT's class FFF, a tree of neurons: load it into the "
            "kind 'neuron_tree' (NeuronTreeFFN.from_ultrafastbert). fastfeedforward's FFF, a tree of leaves, has "
            "node_weights and w1s [L, D, W]."
        )
    missing = [name for name in WEIGHTS if name not in state]
    if kind is None or missing:
        raise CheckpointError(
            f"This state dict ({_names(state)}) is not one of fastfeedforward's FFF: "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
        )
    unknown = [name for name in state if name not in WEIGHTS + OTHERS]
    if unknown:
        raise CheckpointError(
            f"This state dict holds {', '.join(unknown)} beside the tensors of fastfeedforward's FFF; if it is a whole "
            "model's, take the entries of one layer, without their prefix."
        )
    tensors = {name: state[name].detach() for name in WEIGHTS}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    w1s, w2s = tensors["w1s"], tensors["w2s"]
    if w1s.dim() != 3 or w2s.dim() != 3 or w1s.shape[0] & (w1s.shape[0] - 1) or 0 in w1s.shape:
        raise CheckpointError(f"w1s must be [L, D, W] and w2s [L, W, O], L a power of two; they are {shapes}.")
    leaves, d_model, width = w1s.shape
    d_out = w2s.shape[2]
    wanted = {
        "node_weights": [leaves - 1, d_model],
        "node_biases": [leaves - 1, 1],
        "w1s": [leaves, d_model, width],
        "b1s": [leaves, width],
        "w2s": [leaves, width, d_out],
        "b2s": [leaves, d_out],
    }
    if shapes != wanted:
        raise CheckpointError(
            f"The tensors of this state dict do not fit together: {shapes}; by w1s and w2s, {wanted}."
        )
    depth = leaves.bit_length() - 1
    if "depth" in state and int(state["depth"]) != depth:
        raise CheckpointError(f"depth is {int(state['depth'])}, but w1s has {leaves} leaves, those of depth {depth}.")
    config = LeafTreeConfig(
        d_model=d_model, d_out=d_out, depth=depth, leaf_width=width, activation=activation, **fields
    )
    ffn = LeafTreeFFN(config).to(device=w1s.device, dtype=w1s.dtype)
    own = {
        "node_weight": tensors["node_weights"],
        "node_bias": tensors["node_biases"].squeeze(1),
        "leaf_up_weight": w1s.transpose(1, 2),
        "leaf_up_bias": tensors["b1s"],
        "leaf_down_weight": w2s.transpose(1, 2),
        "leaf_down_bias": tensors["b2s"],
    }
    # What else a configuration brings (shared part) keeps its start values.
    ffn.load_state_dict(own, strict=False)
    if "leaf_usage" in state:
        ffn.leaf_usage.copy_(state["leaf_usage"].detach().round())
    return ffn


def export_published(ffn: LeafTreeFFN, *, usage: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a `fastfeedforward.FFF` that computes what `ffn` does.

    Args:
        ffn: without a shared part, which the package does not have.
        usage: whether to add `leaf_usage` and `node_usage`, which the package wants if it was built with a
            `usage_mode`. Ours count tokens by their hard decisions, at nodes those that passed.

    Raises:
        CheckpointError: there is a shared part, or the leaves are gated.
    """
    if ffn.config.gated:
        raise CheckpointError("The leaves of this tree are gated; those of fastfeedforward's FFF are not.")
    if ffn.shared is not None:
        raise CheckpointError(
            f"This tree has a shared part of width {ffn.config.shared}; fastfeedforward's FFF has none."
        )
    state = {
        "depth": torch.tensor(ffn.config.depth),
        "node_weights": ffn.node_weight,
        "node_biases": ffn.node_bias.unsqueeze(1),
        "w1s": ffn.leaf_up_weight.transpose(1, 2),
        "b1s": ffn.leaf_up_bias,
        "w2s": ffn.leaf_down_weight.transpose(1, 2),
        "b2s": ffn.leaf_down_bias,
    }
    if usage:
        usage_of_leaves = counts_of(ffn, "leaf_usage")
        levels = [usage_of_leaves]
        for _ in range(ffn.config.depth):
            levels.insert(0, levels[0].view(-1, 2).sum(1))
        state["node_usage"] = torch.cat([usage_of_leaves[:0], *levels[:-1]]).float()
        state["leaf_usage"] = usage_of_leaves.float()
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _names(state: Mapping[str, torch.Tensor]) -> str:
    names = list(state)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
