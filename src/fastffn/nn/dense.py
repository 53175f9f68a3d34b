"""The `dense` kind: the ordinary FFN. It is the baseline, and what merging yields."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from fastffn.nn.base import FFN, FFNConfig, MergedTensor
from fastffn.ops.activations import get_activation
from fastffn.registry import register_ffn

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class DenseConfig(FFNConfig):
    """Configuration of the `dense` kind; see `FFNConfig` for the shared fields.

    Args:
        d_hidden: width H between the two linear maps; None means 4 D.
        bias: whether the linear maps have biases.
        gated: whether a third map `gate` multiplies the hidden activations, as in Llama.
    """

    d_hidden: int | None = None
    bias: bool = True
    gated: bool = False

    def resolved(self) -> Self:
        """See `FFNConfig.resolved`."""
        config = super().resolved()
        assert config.d_model is not None
        return dataclasses.replace(config, d_hidden=config.d_hidden or 4 * config.d_model)

    @property
    def total_width(self) -> int:
        """See `FFNConfig.total_width`."""
        assert self.d_hidden is not None
        return self.d_hidden

    def linear_maps(self) -> dict[str, tuple[int, int]]:
        """`(in, out)` of each linear map by its name: `up`, `down` and, if gated, `gate`."""
        config = self.resolved()
        assert config.d_model and config.d_hidden and config.d_out
        maps = {"up": (config.d_model, config.d_hidden), "down": (config.d_hidden, config.d_out)}
        if self.gated:
            maps["gate"] = (config.d_model, config.d_hidden)
        return maps


M = TypeVar("M", bound=DenseConfig)


class LinearMapFFN(FFN[M], ABC):
    """`y = down(act(up(x)))`; gated: `y = down(act(gate(x)) * up(x))`: kinds differ in what the maps are made of."""

    up: nn.Module
    gate: nn.Module
    down: nn.Module

    def __init__(self, config: M) -> None:
        super().__init__(config)
        for name, (d_in, d_out) in self.config.linear_maps().items():
            self.add_module(name, self.linear_map(d_in, d_out))
        self.act = get_activation(config.activation)

    @abstractmethod
    def linear_map(self, d_in: int, d_out: int) -> nn.Module:
        """The module for one map `[..., in] -> [..., out]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D] -> [..., O]`."""
        self.check_input(x)
        y: torch.Tensor = self.dropout(self.down(self.hidden(x)))
        return y

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The hidden activations, before `down`: `[..., D] -> [..., H]`."""
        if self.config.gated:
            gated: torch.Tensor = self.act(self.gate(x)) * self.up(x)
            return gated
        return self.act(self.up(x))


@register_ffn("dense", DenseConfig)
class DenseFFN(LinearMapFFN[DenseConfig]):
    """`y = down(act(up(x)))`; gated: `y = down(act(gate(x)) * up(x))`.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of the parameters.
        up.weight, gate.weight: `[H, D]`; up.bias, gate.bias: `[H]`; down.weight: `[O, H]`; down.bias: `[O]`.
    Start values: those of `torch.nn.Linear`; a model that wants others sets them.

    Raises:
        ShapeError: the last axis of `x` is not D.
    Cost: `H (D + O)` multiply-adds a token, gated `H (2 D + O)`.
    """

    up: nn.Linear
    gate: nn.Linear
    down: nn.Linear

    def linear_map(self, d_in: int, d_out: int) -> nn.Module:
        """An ordinary linear layer."""
        return nn.Linear(d_in, d_out, bias=self.config.bias)

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: DenseConfig, inputs: torch.Tensor | None = None) -> Self:
        """A copy of `dense`; there is nothing in `config` that `dense` does not fix."""
        with torch.device("meta"):
            copy = cls(dense.config)
        copy.load_state_dict({name: value.clone() for name, value in dense.state_dict().items()}, assign=True)
        for parameter in copy.parameters():
            parameter.requires_grad_(True)
        return copy.train(dense.training)

    @classmethod
    def merged_tensors(cls, config: DenseConfig) -> dict[str, MergedTensor]:
        """Every tensor is already what it should be."""
        parts = ("weight", "bias") if config.bias else ("weight",)
        names = [f"{linear}.{part}" for linear in config.linear_maps() for part in parts]
        return {name: MergedTensor((name,)) for name in names}

    @classmethod
    def tensor_parallel_plan(cls, config: DenseConfig) -> dict[str, ParallelStyle]:
        """`up` and `gate` by columns, `down` by rows: each process has some of the hidden neurons.

        Communication: one all-reduce of O numbers a token forward; backward one of D numbers a token for `up`, one
        more for `gate`.
        """
        from fastffn.nn.tensor_parallel import ColwiseParallel, RowwiseParallel

        return {
            name: RowwiseParallel() if name == "down" else ColwiseParallel() for name in config.resolved().linear_maps()
        }
