"""Conditional trees of neurons (UltraFastBERT); see README.md of this folder. `IMPLS` is the order of preference."""

from __future__ import annotations

from fastffn.ops.neuron_tree.op import IMPLS, NEURON_TREE, neuron_tree

__all__ = ["IMPLS", "NEURON_TREE", "neuron_tree"]
