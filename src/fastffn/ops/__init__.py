"""Operations with several backends, one folder each; `dispatch` says which backend runs."""

from __future__ import annotations

from fastffn.ops.dispatch import Op

OPS: dict[str, Op] = {op.name: op for op in ()}
