"""A `neuron_tree` FFN whose weights are int8, for inference: a quarter of the memory, and of what a token reads.

No kind of its own: it is made from a trained `neuron_tree`, and cannot be trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastffn import ops
from fastffn.nn.neuron_tree import NeuronTreeConfig, NeuronTreeFFN
from fastffn.ops.int8 import quantize_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from fastffn.nn.dense import DenseFFN

SCALES = ("in_scale", "b_in", "out_scale")


class Int8NeuronTree(nn.Module):
    """The trees of a `NeuronTreeFFN` with int8 weights, each row with a scale; inference only.

    Shapes:
        x: `[..., D]`, float32, bfloat16 or float16; returns `[..., O]` in the dtype of `x`.
        w_in: `[P, N, D]` int8; in_scale, b_in: `[P, N]` float32; w_out: `[P, N, O]` int8; out_scale: `[P, N]` float32;
        with a shared part also `shared.*`, which stays as it is. All are buffers, so state dicts hold them. Scales and
        biases stay float32 under `.half()` and its like.

    Args:
        config: of the tree that it stands for. The weights are zero: `from_float` or `load_state_dict` fills them.

    Raises:
        ShapeError, DtypeError: `x` does not fit.
        BackendError: a gradient is asked.
    """

    w_in: torch.Tensor
    w_out: torch.Tensor
    in_scale: torch.Tensor
    b_in: torch.Tensor
    out_scale: torch.Tensor
    shared: DenseFFN | None

    def __init__(self, config: NeuronTreeConfig) -> None:
        super().__init__()
        self.config = config = config.resolved()
        assert config.d_model and config.d_out
        nodes = config.neurons // config.trees
        for name, width in (("w_in", config.d_model), ("w_out", config.d_out)):
            self.register_buffer(name, torch.zeros(config.trees, nodes, width, dtype=torch.int8))
        for name in SCALES:
            self.register_buffer(name, torch.zeros(config.trees, nodes))
        self.shared = NeuronTreeFFN.shared_part(config)

    @classmethod
    def from_float(cls, ffn: NeuronTreeFFN) -> Self:
        """The same trees with every row of weights rounded to int8, on the same device; nothing is shared."""
        with torch.device("meta"):
            tree = cls(ffn.config)
        w_in, in_scale = quantize_rows(ffn.w_in)
        w_out, out_scale = quantize_rows(ffn.w_out)
        state = {"w_in": w_in, "in_scale": in_scale, "b_in": ffn.b_in.detach().float().clone()}
        state |= {"w_out": w_out, "out_scale": out_scale}
        state |= {n: t.detach().clone() for n, t in ffn.state_dict().items() if n.startswith("shared.")}
        tree.load_state_dict(state, assign=True)
        return tree.train(ffn.training).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D] -> [..., O]`."""
        y = ops.neuron_tree_int8(
            x, self.w_in, self.in_scale, self.b_in, self.w_out, self.out_scale, self.config.activation
        )
        return y if self.shared is None else y + self.shared(x)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        scales = {name: getattr(self, name) for name in SCALES}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """The configuration, for `print(model)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())
