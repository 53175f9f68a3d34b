"""Operations with several backends, one folder each; `dispatch` says which backend runs."""

from __future__ import annotations

from fastffn.ops.dispatch import Op
from fastffn.ops.grouped_mlp.op import OP as _GROUPED_MLP
from fastffn.ops.grouped_mlp.op import grouped_mlp
from fastffn.ops.leaf_mixture.op import OP as _LEAF_MIXTURE
from fastffn.ops.leaf_mixture.op import leaf_mixture

OPS: dict[str, Op] = {op.name: op for op in (_GROUPED_MLP, _LEAF_MIXTURE)}

__all__ = ["OPS", "grouped_mlp", "leaf_mixture"]
