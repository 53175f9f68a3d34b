"""The `low_rank` kind: FastFFN's stage 1. Every linear map W of the dense FFN becomes two factors, W = B A."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastffn.errors import ConfigError
from fastffn.nn.base import MergedTensor
from fastffn.nn.dense import DenseConfig
from fastffn.nn.factorised import FactorisedFFN, FactorisedLinear, best_factors, wide
from fastffn.nn.sharding import subtract_, whole
from fastffn.nn.start.least_squares import weighted_factors
from fastffn.registry import register_ffn

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle
    from typing_extensions import Self

STARTS = ("spectral", "normal")


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(DenseConfig):
    """Configuration of the `low_rank` kind; see `DenseConfig` for the other fields.

    Args:
        rank: r, the width between the two factors of each linear map; None means D / 4. The published rank is 8.
        start: `spectral` (truncated SVD of a dense start, singular values split evenly between the factors; at full
            rank the function stays the same) or `normal` (random factors whose product has the variance of the dense
            weights).
        rescale: whether a spectral start is scaled up to the Frobenius norm of the dense weights.
    """

    rank: int | None = None
    start: str = "spectral"
    rescale: bool = False

    def __post_init__(self) -> None:
        """See `FFNConfig.__post_init__`."""
        super().__post_init__()
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(f"rank is {self.rank!r}; it must be a whole number of at least 1.")
        if self.start not in STARTS:
            raise ConfigError(f"start is '{self.start}'; it must be one of {', '.join(STARTS)}.")

    def resolved(self) -> Self:
        """See `FFNConfig.resolved`; also checks the rank against the widths."""
        config = super().resolved()
        assert config.d_model and config.d_hidden and config.d_out
        smallest = min(config.d_model, config.d_hidden, config.d_out)
        rank = config.rank if config.rank is not None else max(1, min(config.d_model // 4, smallest))
        if rank > smallest:
            raise ConfigError(
                f"rank is {rank}, but the narrowest linear map has min(in, out) = {smallest}: a higher rank costs more "
                f"than the dense FFN and can express nothing more. Choose a rank of at most {smallest}."
            )
        return dataclasses.replace(config, rank=rank)

    @classmethod
    def sizes_for(cls, dense: DenseConfig) -> list[Self]:
        """See `FFNConfig.sizes_for`: ranks that cost parts of the dense FFN."""
        assert dense.d_model and dense.d_hidden and dense.d_out
        equal = dense.d_model * dense.d_hidden / (dense.d_model + dense.d_hidden)
        smallest = min(dense.d_model, dense.d_hidden, dense.d_out)
        return [cls(rank=min(smallest, max(1, round(part * equal)))) for part in (0.25, 0.5, 0.75)]


class LowRankLinear(FactorisedLinear):
    """`y = b(a(x))`: a linear map of rank r, without a bias between the factors.

    Shapes: `a.weight [r, in]`, `b.weight [out, r]`, `b.bias [out]`.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.a = nn.Linear(d_in, rank, bias=False)
        self.b = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in] -> [..., out]`."""
        y: torch.Tensor = self.b(self.a(x))
        return y

    @torch.no_grad()
    def start_from(
        self, dense: nn.Linear, config: DenseConfig, *, fresh: bool, covariance: torch.Tensor | None = None
    ) -> None:
        """See `FactorisedLinear.start_from`; a fresh start is made like any other."""
        assert isinstance(config, LowRankConfig)
        rank = self.a.out_features
        if config.start == "normal":
            # var(sum of r products) = r var(a) var(b); both factors get the fourth root of var(W) / r as deviation.
            deviation = (dense.weight.detach().float().var(correction=0) / rank) ** 0.25
            self.a.weight.normal_().mul_(deviation)
            self.b.weight.normal_().mul_(deviation)
        else:
            weight = wide(dense.weight)
            if covariance is None:
                a, b, _ = best_factors(weight, rank)
            else:
                a, b = weighted_factors(weight, rank, covariance)
            if config.rescale:
                root = (weight.norm() / (b @ a).norm().clamp_min(torch.finfo(b.dtype).tiny)).sqrt()
                a, b = root * a, root * b
            self.a.weight.copy_(a)
            self.b.weight.copy_(b)
        if self.b.bias is not None:
            self.b.bias.copy_(dense.bias)

    def bias_parameter(self) -> nn.Parameter:
        """See `FactorisedLinear.bias_parameter`."""
        return self.b.bias

    @torch.no_grad()
    def decay_product_(self, amount: float) -> None:
        """`b -= amount * b (a a^T)`, `a -= amount * (b^T b) a`, both from the old values."""
        a, b = whole(self.a.weight), whole(self.b.weight)
        step_b, step_a = b @ (a @ a.T), (b.T @ b) @ a
        subtract_(self.b.weight, step_b, amount)
        subtract_(self.a.weight, step_a, amount)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`b @ a`, computed in float64 and rounded once to the dtype of `b`. a: `[r, in]`, b: `[out, r]`."""
    # On the CPU: several accelerators have no float64.
    return (b.detach().cpu().double() @ a.detach().cpu().double()).to(dtype=b.dtype, device=b.device)


@register_ffn("low_rank", LowRankConfig)
class LowRankFFN(FactorisedFFN[LowRankConfig, LowRankLinear]):
    """A dense FFN whose linear maps have rank r: `W = B A`, the activation between the two maps.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of the parameters.
        up.a.weight, gate.a.weight: `[r, D]`; up.b.weight, gate.b.weight: `[H, r]`; up.b.bias, gate.b.bias: `[H]`;
        down.a.weight: `[r, H]`; down.b.weight: `[O, r]`; down.b.bias: `[O]`.

    Raises:
        ShapeError: the last axis of `x` is not D.
    Cost: `r (D + 2 H + O)` multiply-adds a token; the dense FFN costs `H (D + O)`.
    Reference: FastFFN, stage 1 (MindSpore research code, 2022).
    """

    def linear_map(self, d_in: int, d_out: int) -> LowRankLinear:
        """Two factors."""
        assert self.config.rank is not None
        return LowRankLinear(d_in, d_out, self.config.rank, self.config.bias)

    @classmethod
    def merged_tensors(cls, config: LowRankConfig) -> dict[str, MergedTensor]:
        """`weight = b.weight @ a.weight`; the bias of `b` is the bias."""
        recipe = {}
        for name in config.linear_maps():
            recipe[f"{name}.weight"] = MergedTensor((f"{name}.a.weight", f"{name}.b.weight"), product)
            if config.bias:
                recipe[f"{name}.bias"] = MergedTensor((f"{name}.b.bias",))
        return recipe

    @classmethod
    def tensor_parallel_plan(cls, config: LowRankConfig) -> dict[str, ParallelStyle]:
        """The wide sides are split (`up.b` and `gate.b` by columns, `down.a` by rows), the thin factors replicated.

        Communication: one all-reduce of r numbers a token forward (the output of `down.a`; the dense kind moves O);
        backward one of r numbers for `up.b`, one more for `gate.b`. In exchange every process computes `up.a`,
        `gate.a` and `down.b` whole: `r (D + O)` multiply-adds a token that do not become fewer with more processes.
        """
        from fastffn.nn.tensor_parallel import ColwiseParallel, Replicated, RowwiseParallel

        plan: dict[str, ParallelStyle] = {}
        for name in config.resolved().linear_maps():
            a, b = (RowwiseParallel(), Replicated()) if name == "down" else (Replicated(), ColwiseParallel())
            plan |= {f"{name}.a": a, f"{name}.b": b}
        return plan
