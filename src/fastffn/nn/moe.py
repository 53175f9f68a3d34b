"""The `moe` kind: a mixture of experts, each token through its k best. What the trees are compared with.

    s = router(x) (+ noise in training),   the k largest of s,   y = sum over them of softmax(s)_e expert_e(x)

Dropless: each expert takes as many tokens as choose it. With k = 1 a softmax over the chosen would be 1 and give the
router no gradient; the weight is then the expert's softmax over all of them (Switch Transformer, arXiv 2101.03961).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from fastffn.errors import ConfigError
from fastffn.nn.auxiliary import AuxiliaryLoss
from fastffn.nn.base import FFN, FFNConfig
from fastffn.nn.dense import DenseConfig, DenseFFN
from fastffn.nn.usage import add_counts, occurrences, register_counts
from fastffn.ops import grouped_mlp
from fastffn.registry import register_ffn

if TYPE_CHECKING:
    from typing_extensions import Self


WEIGHTINGS = ("softmax", "sum")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(FFNConfig):
    """Configuration of the `moe` kind; see `FFNConfig` for the shared fields.

    Args:
        bias: whether the experts have biases; the router has none.
        gated: whether a third map `gate` multiplies the hidden activations, as in Llama.
        experts: E, their number.
        expert_width: W, hidden neurons of an expert. None means 4 D / active: a token meets as many as in a usual FFN.
        active: k, experts that each token passes.
        shared: width of a dense FFN that every token passes as well; 0 for none.
        weighting: `softmax` weighs the chosen experts' outputs; `sum` adds them up as they are, like the parts of a
            dense FFN: what a mixture made from one has. The router then learns as if they had been weighed.
        noise: whether scores get a trained amount of normal noise in training (arXiv 1701.06538).
        balance_weight: weight of E times the sum over the experts of share of tokens times mean probability: 1 where
            they spread evenly (Switch Transformer, arXiv 2101.03961).
    """

    bias: bool = True
    gated: bool = False
    experts: int = 8
    expert_width: int | None = None
    active: int = 2
    shared: int = 0
    weighting: str = "softmax"
    noise: bool = False
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        """See `FFNConfig.__post_init__`."""
        super().__post_init__()
        for name in ("experts", "expert_width", "active"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.active > self.experts:
            raise ConfigError(f"active is {self.active}, but there are only {self.experts} experts.")
        if isinstance(self.shared, bool) or not isinstance(self.shared, int) or self.shared < 0:
            raise ConfigError(f"shared is {self.shared!r}; it must be a whole number, 0 for no shared part.")
        if self.weighting not in WEIGHTINGS:
            raise ConfigError(f"weighting is '{self.weighting}'; it must be one of {', '.join(WEIGHTINGS)}.")
        if not 0.0 <= self.balance_weight < math.inf:
            raise ConfigError(f"balance_weight is {self.balance_weight}; it must be a number of at least 0.")

    def resolved(self) -> Self:
        """See `FFNConfig.resolved`."""
        config = super().resolved()
        assert config.d_model is not None
        width = config.expert_width or max(1, 4 * config.d_model // config.active)
        return dataclasses.replace(config, expert_width=width)

    @property
    def total_width(self) -> int:
        """See `FFNConfig.total_width`."""
        assert self.expert_width is not None
        return self.experts * self.expert_width + self.shared

    @property
    def active_width(self) -> int:
        """See `FFNConfig.active_width`."""
        assert self.expert_width is not None
        return self.active * self.expert_width + self.shared

    @classmethod
    def sizes_for(cls, dense: DenseConfig) -> list[Self]:
        """See `FFNConfig.sizes_for`: an eighth of the neurons shared, the others in 14 experts of a sixteenth each."""
        width = dense.total_width
        shared = width // 8
        own = -(-(width - shared) // 14)
        return [cls(experts=14, expert_width=own, active=active, shared=shared) for active in (4, 6) if width >= 64]

    def shared_config(self) -> DenseConfig:
        """Configuration of the part that every token passes."""
        return DenseConfig(
            d_model=self.d_model,
            d_out=self.d_out,
            d_hidden=self.shared,
            activation=self.activation,
            bias=self.bias,
            gated=self.gated,
        )


@register_ffn("moe", MoEConfig)
class MoEFFN(AuxiliaryLoss, FFN[MoEConfig]):
    """Mixture of experts: a router sends each token through the k best of E MLPs.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of the parameters.
        router.weight: `[E, D]`; optionally noise.weight: `[E, D]`, and shared.*, a `dense` FFN.
        expert_up_weight, gated also expert_gate_weight: `[E, W, D]`; expert_up_bias, expert_gate_bias: `[E, W]`.
        expert_down_weight: `[E, O, W]`; expert_down_bias: `[E, O]`.
        expert_usage (no part of the state dict): `[E]`, tokens that each expert got in training.
    Start values: experts like `torch.nn.Linear`; the router a tenth of that: at first all experts are nearly equal.

    Raises:
        ShapeError: the last axis of `x` is not D.
        DtypeError: `x` is not floating-point.
    Cost: `E D + k W (D + O)` multiply-adds a token, gated `E D + k W (2 D + O)`.
    Reference: Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538.
    """

    expert_usage: torch.Tensor
    expert_up_bias: nn.Parameter | None
    expert_down_bias: nn.Parameter | None
    expert_gate_weight: nn.Parameter | None
    expert_gate_bias: nn.Parameter | None

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        config = self.config
        assert config.d_model and config.d_out and config.expert_width
        D, O, W, E = config.d_model, config.d_out, config.expert_width, config.experts  # noqa: E741
        self.router = nn.Linear(D, E, bias=False)
        self.noise = nn.Linear(D, E, bias=False) if config.noise else None

        def parameter(*shape: int, given: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape)) if given else None

        self.expert_up_weight = nn.Parameter(torch.empty(E, W, D))
        self.expert_up_bias = parameter(E, W, given=config.bias)
        self.expert_down_weight = nn.Parameter(torch.empty(E, O, W))
        self.expert_down_bias = parameter(E, O, given=config.bias)
        self.expert_gate_weight = parameter(E, W, D, given=config.gated)
        self.expert_gate_bias = parameter(E, W, given=config.gated and config.bias)
        self.shared = DenseFFN(config.shared_config()) if config.shared else None
        register_counts(self, "expert_usage", E)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws start values."""
        assert self.config.d_model and self.config.expert_width
        for linear in (self.router, self.noise):
            if linear is not None:
                linear.reset_parameters()
                linear.weight.mul_(0.1)
        into, out_of = self.config.d_model**-0.5, self.config.expert_width**-0.5
        for name, value in self.named_parameters():
            if name.startswith("expert_"):
                bound = out_of if name.startswith("expert_down") else into
                value.uniform_(-bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D] -> [..., O]`."""
        self.check_input(x)
        config, rows = self.config, x.reshape(-1, x.shape[-1])
        scores: torch.Tensor = self.router(rows)
        if self.noise is not None and self.training:
            scores = scores + torch.randn_like(scores) * F.softplus(self.noise(rows))
        # In float32 at least: the weights of two bfloat16 scores would not sum to 1.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        best, chosen = scores.topk(config.active, dim=1)
        if config.active > 1 and config.weighting == "softmax":
            weights = best.softmax(1)
        else:
            weights = scores.softmax(1).gather(1, chosen)
        self.ask(self._balance_loss(scores, chosen))
        if self.training:
            add_counts(self, "expert_usage", chosen)
        y = grouped_mlp(
            rows if config.active == 1 else rows.repeat_interleave(config.active, 0),
            chosen.flatten(),
            self.expert_up_weight,
            self.expert_up_bias,
            self.expert_down_weight,
            self.expert_down_bias,
            self.expert_gate_weight,
            self.expert_gate_bias,
            activation=config.activation,
        )
        y = y.unflatten(0, (-1, config.active))
        if config.weighting == "softmax":
            y = (y * weights.to(y.dtype).unsqueeze(2)).sum(1)
        elif torch.is_grad_enabled():
            # 1, with the gradient of each expert's weight.
            y = (y * (1 + (weights - weights.detach())).to(y.dtype).unsqueeze(2)).sum(1)
        else:
            y = y.sum(1)
        if self.shared is not None:
            y = y + self.shared(rows)
        dropped: torch.Tensor = self.dropout(y)
        return dropped.view(*x.shape[:-1], dropped.shape[-1])

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: MoEConfig, inputs: torch.Tensor | None = None) -> Self:
        """The neurons of `dense`, grouped by the tokens `inputs [S, D]` on which they work; see `nn/start/moe.py`.

        `weighting` becomes `sum`. Without `expert_width` all neurons are taken; with fewer, those that do most.

        Raises:
            KindError: there are no inputs.
            ConfigError: the shared part is wider than `dense`.
        """
        from fastffn.nn.start.moe import start_moe
        from fastffn.nn.start.shown import start_module

        rest = dense.config.total_width - config.shared
        width = config.expert_width or max(1, -(-rest // config.experts))
        fitted = dataclasses.replace(config.fitted_to(dense.config), expert_width=width, weighting="sum")
        return start_module(cls, fitted, start_moe, dense, inputs)

    @torch.no_grad()
    def decision_margins(self, x: torch.Tensor) -> torch.Tensor:
        """See `FFN.decision_margins`: between the last expert that is chosen and the first that is not."""
        if self.config.active == self.config.experts:
            return super().decision_margins(x)
        best = self.router(x).topk(self.config.active + 1, dim=1).values
        return best[:, -2] - best[:, -1]

    def _balance_loss(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor | None:
        config = self.config
        if not (self.training and config.balance_weight):
            return None
        share = occurrences(chosen, config.experts).to(scores.dtype) / max(chosen.numel(), 1)
        probability = scores.softmax(1).sum(0) / max(scores.shape[0], 1)
        return config.balance_weight * config.experts * (share * probability).sum()
