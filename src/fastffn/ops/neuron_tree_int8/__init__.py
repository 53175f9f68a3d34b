"""Conditional trees of neurons whose weights are int8, for inference. `IMPLS` is the order of preference."""

from __future__ import annotations

from fastffn.ops.neuron_tree_int8.op import IMPLS, NEURON_TREE_INT8, neuron_tree_int8

__all__ = ["IMPLS", "NEURON_TREE_INT8", "neuron_tree_int8"]
