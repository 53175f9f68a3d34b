"""Floating-point operations of a training step, counted; and the speed-up that they allow.

Only matrix products count, and singular value decompositions, from which factors start. In causal attention half of
the score matrix is never needed; it is left out, so that the bound is one that a perfect kernel could reach. For the
same reason our own operations count what they must do (of a tree the neurons that are visited), whatever a backend
does beyond that; it takes device "meta" to see them whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastffn.ops import OPS
from fastffn.ops.dispatch import Op


def _own_formulas() -> dict[Any, Callable[..., int]]:
    formulas: dict[Any, Callable[..., int]] = {}

    def add(op: Op) -> None:
        def forward(*shapes: Any, out_shape: Any) -> int:
            return op.flops(*shapes)

        # (gradient, tensors, options, saved, needs); two products for each one of the forward pass.
        def backward(*shapes: Any, out_shape: Any) -> int:
            return 2 * op.flops(*shapes[1 : 1 + op.arguments])

        formulas[op.operator] = forward
        if op.operator_backward is not None:
            formulas[op.operator_backward] = backward

    for op in OPS.values():
        add(op)
    formulas[torch.ops.aten._linalg_svd] = _svd_flops
    return formulas


def _svd_flops(shape: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """Of a thin SVD by way of a QR: 6 m n^2 + 20 n^3 (Golub and Van Loan, Matrix Computations, figure 8.6.1)."""
    *batch, rows, columns = shape
    m, n = max(rows, columns), min(rows, columns)
    return int(math.prod(batch) * (6 * m * n**2 + 20 * n**3))


def count_flops(run: Callable[[], object], *, causal: bool = True) -> int:
    """Floating-point operations of the matrix products in `run()`, two for each multiply-add.

    Args:
        run: executes once; tensors on device "meta" make it free.
        causal: whether the batched products are causal attention, of which half is needed.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton where it is installed

    counter = FlopCounterMode(display=False, custom_mapping=_own_formulas())
    with counter:
        run()
    total = 0
    for operator, flops in counter.get_flop_counts().get("Global", {}).items():
        attention = "scaled_dot_product" in str(operator) or str(operator) in ("aten.bmm", "aten.baddbmm")
        total += flops // 2 if attention and causal else flops
    return total


def step_flops(model: nn.Module, sequence: int, *, causal: bool = True) -> int:
    """Forward and backward FLOPs of a language model (on device "meta") on one sequence; see `count_flops`."""

    def run() -> Any:
        ids = torch.zeros(1, sequence, dtype=torch.long, device="meta")
        # With a cache transformers does not look into the tokens for packed sequences; "meta" tokens have no values.
        options = {"use_cache": True} if causal else {}
        return model(input_ids=ids, labels=ids, **options).loss.backward()

    return count_flops(run, causal=causal)


def layer_flops(layer: nn.Module, sequence: int, width: int, *, backward: bool = True) -> int:
    """FLOPs of a layer without attention (on device "meta") on one sequence, in the mode that it is in.

    Its batched products, such as those of block-diagonal matrices, count in full.

    Args:
        layer: maps `[1, sequence, width]` to something of its choice.
        backward: whether those of the backward pass count too.
    """

    def run() -> Any:
        with torch.set_grad_enabled(backward):
            y = layer(torch.zeros(1, sequence, width, device="meta", requires_grad=backward))
            return y.sum().backward() if backward else y

    return count_flops(run, causal=False)


@dataclass(frozen=True)
class StepBound:
    """What arithmetic alone allows stage 1 to gain.

    Attributes:
        dense: FLOPs of a dense training step; factorised: of a factorised one; without_ffn: of one without FFNs.
    """

    dense: int
    factorised: int
    without_ffn: int

    @property
    def speedup(self) -> float:
        """How many times faster a factorised step can be, if every FLOP takes the same time."""
        return self.dense / self.factorised

    @property
    def speedup_of_free_ffn(self) -> float:
        """How many times faster a step would be whose FFNs cost nothing: no approximation can beat this."""
        return self.dense / self.without_ffn
