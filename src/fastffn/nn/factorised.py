"""What the kinds share whose linear maps are products of factors, and that become dense by multiplying them out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn

from fastffn.nn.dense import DenseConfig, DenseFFN, LinearMapFFN
from fastffn.nn.start.least_squares import covariance, refit, refit_with_bias
from fastffn.nn.start.shown import on_cpu

if TYPE_CHECKING:
    from typing_extensions import Self


class FactorisedLinear(nn.Module, ABC):
    """A linear map `[..., in] -> [..., out]` made of factors."""

    @abstractmethod
    def start_from(
        self, dense: nn.Linear, config: DenseConfig, *, fresh: bool, covariance: torch.Tensor | None = None
    ) -> None:
        """Sets the factors from a dense map.

        Args:
            dense: the map to approximate; its bias is copied.
            config: of the kind.
            fresh: whether `dense` is only an example of what fresh weights look like, of which the spread counts and
                not the values.
            covariance: `[in, in]` of the inputs on which the approximation is to be good; None for all alike.
        """

    @abstractmethod
    def bias_parameter(self) -> nn.Parameter:
        """The bias of the map, which has one."""

    @abstractmethod
    def decay_product_(self, amount: float) -> None:
        """One step of size `amount` against the gradient of ||W||^2 / 2, all factors at once, from the old values."""


L = TypeVar("L", bound=FactorisedLinear)
M = TypeVar("M", bound=DenseConfig)


class FactorisedFFN(LinearMapFFN[M], Generic[M, L]):
    """An FFN whose linear maps are made of factors: `linear_map` gives a `FactorisedLinear`."""

    def __init__(self, config: M) -> None:
        super().__init__(config)
        dense = DenseFFN(DenseConfig().fitted_to(self.config))
        # Without weights (device "meta": a checkpoint is about to be loaded) there is nothing to start from.
        if not any(parameter.is_meta for parameter in dense.parameters()):
            self._start_from(dense, fresh=True)

    @abstractmethod
    def linear_map(self, d_in: int, d_out: int) -> L:
        """See `LinearMapFFN.linear_map`."""

    def _linears(self) -> dict[str, L]:
        return {name: getattr(self, name) for name in self.config.linear_maps()}

    @torch.no_grad()
    def _start_from(self, dense: DenseFFN, *, fresh: bool) -> None:
        for name, linear in self._linears().items():
            linear.start_from(getattr(dense, name), self.config, fresh=fresh)

    @torch.no_grad()
    def _start_on(self, dense: DenseFFN, inputs: torch.Tensor) -> None:
        """The factors that are best on given tokens `[S, D]`; everything in float32, on the CPU.

        `down` makes up for what `up` and `gate` got wrong: it is fitted to the dense FFN's outputs on the hidden
        activations that are there now.
        """
        bias = self.config.bias
        linears = self._linears()
        for name in linears:
            if name != "down":
                self._start_linear_on(name, getattr(dense, name), inputs)
        hidden, wanted = self.hidden(inputs), dense.down(dense.hidden(inputs))
        down = copy.deepcopy(dense.down)
        if bias:
            weight, constant = refit_with_bias(hidden, wanted, down.weight)
            down.weight.copy_(weight), down.bias.copy_(constant)
        else:
            down.weight.copy_(refit(hidden, wanted, down.weight))
        self._start_linear_on("down", down, hidden)

    def _start_linear_on(self, name: str, dense: nn.Linear, inputs: torch.Tensor) -> None:
        linear = self._linears()[name]
        centred = self.config.bias
        linear.start_from(dense, self.config, fresh=False, covariance=covariance(inputs, centred=centred))
        if centred:
            # The bias takes up the mean of what the factors leave over.
            linear.bias_parameter().add_((dense(inputs) - linear(inputs)).mean(0))

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: M, inputs: torch.Tensor | None = None) -> Self:
        """Factors that approximate `dense` as `config.start` says; biases are copied.

        With `inputs`, a `spectral` start is the best on those tokens (an SVD weighted by their covariance).
        """
        fitted = config.fitted_to(dense.config)
        with torch.device("meta"):
            module = cls(fitted)
        like = next(dense.parameters())
        if inputs is None or getattr(fitted, "start", None) != "spectral":
            module.to(like.dtype).to_empty(device=like.device)
            module._start_from(dense, fresh=False)
        else:
            module.to(torch.float32).to_empty(device="cpu").eval()
            module._start_on(*on_cpu(dense, inputs))
            module.to(like.device, like.dtype)
        return module.train(dense.training)

    @torch.no_grad()
    def decay_product_(self, amount: float) -> None:
        """Frobenius decay: one step of size `amount` against the gradient of ||W||^2 / 2 for each linear map W."""
        for linear in self._linears().values():
            linear.decay_product_(amount)


def best_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The truncated SVD of `weight [..., out, in]`: the nearest matrix of that rank in the Frobenius norm.

    Returns:
        `a [..., rank, in]` and `b [..., out, rank]` with `b @ a` the approximation, its singular values split evenly
        between them, and those `[..., rank]`.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    root = s.sqrt()
    return root[..., :, None] * vh, u * root[..., None, :], s


def wide(weight: torch.Tensor) -> torch.Tensor:
    """`weight` in a dtype that an SVD can work in: float32 at least."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
