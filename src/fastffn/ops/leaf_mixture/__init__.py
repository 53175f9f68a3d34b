"""The operation `leaf_mixture`: every leaf of a tree for every token, each weighted by its path."""

from fastffn.ops.leaf_mixture.op import OP, leaf_mixture

__all__ = ["OP", "leaf_mixture"]
