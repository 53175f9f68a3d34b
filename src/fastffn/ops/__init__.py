"""Operations with several backends, one folder each; `dispatch` says which backend runs."""

from __future__ import annotations

from fastffn.ops.dispatch import Op
from fastffn.ops.neuron_tree import NEURON_TREE, neuron_tree

__all__ = ["OPS", "neuron_tree"]

OPS: dict[str, Op] = {op.name: op for op in (NEURON_TREE,)}
