"""Grouped MLPs whose weights are int8, for inference. `IMPLS` is the order of preference."""

from __future__ import annotations

from fastffn.ops.grouped_mlp_int8.op import GROUPED_MLP_INT8, IMPLS, grouped_mlp_int8

__all__ = ["GROUPED_MLP_INT8", "IMPLS", "grouped_mlp_int8"]
