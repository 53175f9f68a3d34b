"""The operation `grouped_mlp`: token n goes through MLP e(n)."""

from fastffn.ops.grouped_mlp.op import OP, grouped_mlp

__all__ = ["OP", "grouped_mlp"]
