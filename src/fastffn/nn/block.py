"""The `block` kind (Monarch-like): every linear map W of the dense FFN becomes two block-diagonal factors, W = L Pi R.

With k blocks, `m = min(in, out)` and `q = m / k`, a map `[in] -> [out]` is

    u[j, p] = sum_i R[j, p, i] x[j, i]          R: k blocks [q, in/k]; block j reads the j-th chunk of the input
    v[p k + j] = u[j, p]                        Pi transposes the index (k, q) to (q, k)
    y[b, o] = sum_s L[b, o, s] v[b q + s]       L: k blocks [out/k, q]; block b reads the b-th chunk of v, q entries

The chunks of v are consecutive entries of the transposed index `t = p k + j`, so neighbours come from different R
blocks: L block b mixes all inputs as soon as q >= k. The inner index t belongs to R block `t mod k` and to L block
`t // q`, hence to one sub-matrix of W only: W[b, j] (output chunk b, input chunk j) is a product of rank |T(b, j)|,

    W[b, j] = sum over t in T(b, j) of L[b, :, t - b q] R[j, t // k, :],    T(b, j) = {t: t // q = b, t mod k = j},

and the sub-matrices share no parameter. |T(b, j)| is q / k where k divides q, otherwise that rounded down or up;
with q < k some sub-matrices are zero: their output chunk does not see that input chunk.

The best approximation of a given W is therefore exact and direct: the truncated SVD of each sub-matrix by itself
(Dao et al. 2022, Monarch: Expressive Structured Matrices, arXiv 2204.00595, theorem 1, there for |T| = 1).
"""

from __future__ import annotations

import math
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
    from typing_extensions import Self

STARTS = ("spectral", "normal")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(DenseConfig):
    """Configuration of the `block` kind; see `DenseConfig` for the other fields.

    Args:
        blocks: k, blocks of each factor; it must divide all widths. The cost falls as 1 / k. The default of 4 costs
            what `low_rank` costs at its default rank (with H = 4 D), and divides the widths of all common models.
        rank: width of a low-rank term `b(a(x))` added to each linear map; 0 for none.
        start: how a module is made from a dense one: `spectral` (the low-rank term, if any, is the truncated SVD, the
            block product the nearest to what that leaves over) or `normal` (random factors whose product has the
            variance of the dense weights). Modules made from nothing always start `normal`.
    """

    blocks: int = 4
    rank: int = 0
    start: str = "spectral"

    def __post_init__(self) -> None:
        """See `FFNConfig.__post_init__`."""
        super().__post_init__()
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise ConfigError(f"blocks is {self.blocks!r}; it must be a whole number of at least 1.")
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ConfigError(f"rank is {self.rank!r}; it must be a whole number, 0 for no low-rank term.")
        if self.start not in STARTS:
            raise ConfigError(f"start is '{self.start}'; it must be one of {', '.join(STARTS)}.")

    def resolved(self) -> Self:
        """See `FFNConfig.resolved`; also checks blocks and rank against the widths."""
        config = super().resolved()
        assert config.d_model and config.d_hidden and config.d_out
        widths = (config.d_model, config.d_hidden, config.d_out)
        common = math.gcd(*widths)
        if common % config.blocks:
            divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ConfigError(
                f"blocks is {config.blocks}, which does not divide all of d_model {config.d_model}, d_hidden "
                f"{config.d_hidden} and d_out {config.d_out}. Numbers that do: {divisors}."
            )
        if config.rank > min(widths):
            raise ConfigError(
                f"rank is {config.rank}, but the narrowest linear map has min(in, out) = {min(widths)}: a higher rank "
                f"costs more than the dense FFN and can express nothing more. Choose a rank of at most {min(widths)}."
            )
        return config


class BlockLinear(FactorisedLinear):
    """`y = L Pi R x + b(a(x)) + bias`; see the top of the file.

    Shapes: `r [k, q, in/k]`, `l [k, out/k, q]`, `bias [out]`, `q = min(in, out) / k`; with a low-rank term
    `a.weight [rank, in]`, `b.weight [out, rank]`.
    """

    def __init__(self, d_in: int, d_out: int, blocks: int, rank: int, bias: bool) -> None:
        super().__init__()
        inner = min(d_in, d_out) // blocks
        self.r = nn.Parameter(torch.empty(blocks, inner, d_in // blocks))
        self.l = nn.Parameter(torch.empty(blocks, d_out // blocks, inner))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.rank = rank
        if rank:
            self.a = nn.Linear(d_in, rank, bias=False)
            self.b = nn.Linear(rank, d_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in] -> [..., out]`."""
        y = multiply(x, self.r, self.l, self.bias)
        return y + self.b(self.a(x)) if self.rank else y

    @torch.no_grad()
    def start_from(
        self, dense: nn.Linear, config: DenseConfig, *, fresh: bool, covariance: torch.Tensor | None = None
    ) -> None:
        """See `FactorisedLinear.start_from`."""
        assert isinstance(config, BlockConfig)
        if fresh or config.start == "normal":
            self._start_normal(dense.weight)
        else:
            weight = wide(dense.weight)
            if self.rank:
                # First the few directions that stand out, which block-diagonal factors cannot express.
                if covariance is None:
                    a, b, _ = best_factors(weight, self.rank)
                else:
                    a, b = weighted_factors(weight, self.rank, covariance)
                self.a.weight.copy_(a)
                self.b.weight.copy_(b)
                weight = weight - b @ a
            right, left = project(weight, config.blocks, covariance)
            self.r.copy_(right)
            self.l.copy_(left)
        if self.bias is not None:
            self.bias.copy_(dense.bias)

    def bias_parameter(self) -> nn.Parameter:
        """See `FactorisedLinear.bias_parameter`."""
        assert self.bias is not None
        return self.bias

    def _start_normal(self, weight: torch.Tensor) -> None:
        # The two terms share the variance.
        variance = weight.detach().float().var(correction=0) / (2 if self.rank else 1)
        # An entry of L Pi R is a sum of |T(b, j)| products, q / k on average over the k^2 sub-matrices.
        k, q, _ = self.r.shape
        deviation = (variance * k / q) ** 0.25
        self.r.normal_().mul_(deviation)
        self.l.normal_().mul_(deviation)
        if self.rank:
            deviation = (variance / self.rank) ** 0.25
            self.a.weight.normal_().mul_(deviation)
            self.b.weight.normal_().mul_(deviation)

    @torch.no_grad()
    def decay_product_(self, amount: float) -> None:
        """See `FactorisedLinear.decay_product_`; W is never formed.

        Cost: about `m (in + out) (q / k + rank / k)` multiply-adds and `rank^2 (in + out)` more.
        """
        right, left = whole(self.r), whole(self.l)
        k, q, _ = right.shape
        # R's rows by t = b q + s, those of L block b together: [b, s, in/k].
        rows = right.transpose(0, 1).reshape(k, q, -1)
        # Only rows of one R block share columns of W: t = t' (mod k), which within an L block is s = s' (mod k).
        s = torch.arange(q, device=right.device)
        together = ((s[:, None] - s) % k == 0).to(right.dtype)
        step_l = left @ (rows @ rows.mT * together)
        step_rows = (left.mT @ left * together) @ rows
        step_r = step_rows.view(q, k, -1).transpose(0, 1)
        if self.rank:
            a, b = whole(self.a.weight), whole(self.b.weight)
            # What the low-rank term adds to the factors' gradients, and the other way round.
            inner_a = permute(a, right).permute(1, 2, 0)  # Pi R a^T: [b, s, rank]
            l_b = left.mT @ b.view(k, -1, self.rank)  # L^T b: [b, s, rank]
            l_b_by_input = l_b.reshape(q, k, -1).transpose(0, 1)  # the same by (j, p)
            step_l = step_l + b.view(k, -1, self.rank) @ inner_a.mT
            step_r = step_r + l_b_by_input @ a.view(self.rank, k, -1).transpose(0, 1)
            step_a = b.T @ b @ a + (l_b_by_input.mT @ right).transpose(0, 1).reshape(a.shape)
            step_b = b @ (a @ a.T) + (left @ inner_a).reshape(b.shape)
            subtract_(self.a.weight, step_a, amount)
            subtract_(self.b.weight, step_b, amount)
        subtract_(self.r, step_r, amount)
        subtract_(self.l, step_l, amount)


def permute(x: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`Pi R x`: `[N, in] -> [N, k, q]`, by L block and place in it."""
    k, q, width = right.shape
    u = x.reshape(x.shape[0], k, width).transpose(0, 1) @ right.mT
    return u.permute(1, 2, 0).reshape(x.shape[0], k, q)


def multiply(
    x: torch.Tensor, right: torch.Tensor, left: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`L Pi R x + bias`: `[..., in] -> [..., out]`."""
    k, height, _ = left.shape
    v = permute(x.reshape(x.shape[:-1].numel(), x.shape[-1]), right).transpose(0, 1)
    # The bias within the product: one pass less over the output, the widest tensor here.
    y = v @ left.mT if bias is None else torch.baddbmm(bias.view(k, 1, height), v, left.mT)
    return y.transpose(0, 1).reshape(*x.shape[:-1], k * height)


def expand(right: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The matrix `W = L Pi R [out, in]`, in the dtype of the factors."""
    k, q, width = right.shape
    pi_r = right.new_zeros(q, k, k, width)  # (p, j) is t; the input by chunk
    pi_r.diagonal(dim1=1, dim2=2).copy_(right.permute(1, 2, 0))
    return (left @ pi_r.view(k, q, k * width)).flatten(0, 1)


def project(
    weight: torch.Tensor, blocks: int, covariance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors `r [k, q, in/k]` and `l [k, out/k, q]` whose product is nearest to `weight [out, in]`.

    Nearest in the Frobenius norm, each sub-matrix by itself; the singular values are split evenly between the factors.
    With a covariance `[in, in]` of the inputs each is the best on its own chunk of them.
    """
    d_out, d_in = weight.shape
    k, q = blocks, min(d_in, d_out) // blocks
    parts = weight.reshape(k, d_out // k, k, d_in // k).transpose(1, 2)  # [b, j, out/k, in/k]
    if covariance is None:
        a, b, _ = best_factors(parts, -(-q // k))
    else:
        of_chunks = covariance.reshape(k, d_in // k, k, d_in // k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        a, b = weighted_factors(parts, -(-q // k), of_chunks.expand(k, -1, -1, -1))
    # The inner indices t in order, and for each: its L block, its R block, and which singular value of W[b, j] it is.
    t = torch.arange(k * q, device=weight.device)
    of_l, of_r = t // q, t % k
    which = (t - of_l * q) // k
    right = a[of_l, of_r, which].view(q, k, -1).transpose(0, 1)
    left = b[of_l, of_r, :, which].view(k, q, -1).transpose(1, 2)
    return right.contiguous(), left.contiguous()


def merged_weight(
    right: torch.Tensor,
    left: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
) -> torch.Tensor:
    """`L Pi R (+ b a) [out, in]`, computed in float64 and rounded once to the dtype of `left`."""
    # On the CPU: several accelerators have no float64.
    total = expand(right.detach().cpu().double(), left.detach().cpu().double())
    if a is not None and b is not None:
        total += b.detach().cpu().double() @ a.detach().cpu().double()
    return total.to(dtype=left.dtype, device=left.device)


@register_ffn("block", BlockConfig)
class BlockFFN(FactorisedFFN[BlockConfig, BlockLinear]):
    """A dense FFN whose linear maps are `W = L Pi R`: block-diagonal factors with a transposition between them.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of the parameters.
        X.r: `[k, m/k, in/k]`; X.l: `[k, out/k, m/k]`; X.bias: `[out]`; X is up, down or gate, `[in] -> [out]` its
        widths, m = min(in, out); with a low-rank term X.a.weight: `[rank, in]`, X.b.weight: `[out, rank]`.

    Raises:
        ShapeError: the last axis of `x` is not D.
    Cost: `m (in + out) / k` multiply-adds a token for each map, and `rank (in + out)` for a low-rank term; the dense
        FFN costs `in out`.
    Reference: Dao et al., Monarch: Expressive Structured Matrices for Efficient and Accurate Training, ICML 2022,
        arXiv 2204.00595.
    """

    def linear_map(self, d_in: int, d_out: int) -> BlockLinear:
        """Two block-diagonal factors, and two thin ones."""
        return BlockLinear(d_in, d_out, self.config.blocks, self.config.rank, self.config.bias)

    @classmethod
    def merged_tensors(cls, config: BlockConfig) -> dict[str, MergedTensor]:
        """`weight = L Pi R`, plus `b.weight @ a.weight` with a low-rank term; the bias is the bias."""
        parts = ("r", "l", "a.weight", "b.weight") if config.rank else ("r", "l")
        recipe = {}
        for name in config.linear_maps():
            recipe[f"{name}.weight"] = MergedTensor(tuple(f"{name}.{part}" for part in parts), merged_weight)
            if config.bias:
                recipe[f"{name}.bias"] = MergedTensor((f"{name}.bias",))
        return recipe
