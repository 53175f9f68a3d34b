"""Operations with several backends, one folder each; `dispatch` says which backend runs."""

from __future__ import annotations

from fastffn.ops.dispatch import Op
from fastffn.ops.grouped_mlp.op import OP as GROUPED_MLP
from fastffn.ops.grouped_mlp.op import grouped_mlp
from fastffn.ops.grouped_mlp_int8 import GROUPED_MLP_INT8, grouped_mlp_int8
from fastffn.ops.leaf_mixture.op import OP as LEAF_MIXTURE
from fastffn.ops.leaf_mixture.op import leaf_mixture
from fastffn.ops.neuron_tree import NEURON_TREE, neuron_tree
from fastffn.ops.neuron_tree_int8 import NEURON_TREE_INT8, neuron_tree_int8

__all__ = ["OPS", "grouped_mlp", "grouped_mlp_int8", "leaf_mixture", "neuron_tree", "neuron_tree_int8"]

OPS: dict[str, Op] = {
    op.name: op for op in (NEURON_TREE, NEURON_TREE_INT8, GROUPED_MLP, GROUPED_MLP_INT8, LEAF_MIXTURE)
}
