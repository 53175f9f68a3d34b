"""The `leaf_tree` kind: fast feedforward networks (arXiv 2308.14711). A tree of decisions picks one small MLP of many.

Node j has the children 2j + 1 (left) and 2j + 2 (right); the 2^depth leaves hang below the last nodes, from left to
right. With s_j = <x, node_weight[j]> + node_bias[j] the weight of going right is c_j = sigmoid(s_j).

    soft (FORWARD_T)   y = sum over l of m_l leaf_l(x), m_l the product of c_j or 1 - c_j along the path of leaf l
    hard (FORWARD_I)   right where s_j >= 0; y is that one leaf's output

Hard training costs one leaf. Its straight-through gradient takes each decision on the path as if it had weighted the
leaf with its c, or 1 - c: of each node on the path dL/dc = +-<dL/dy, leaf(x)>, where the leaves not taken, which would
enter with the other sign, are left out, because evaluating them would cost what hard training saves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from fastffn.errors import ConfigError
from fastffn.nn.auxiliary import AuxiliaryLoss
from fastffn.nn.base import FFN, FFNConfig
from fastffn.nn.dense import DenseConfig, DenseFFN
from fastffn.nn.leaf_path import Path, binary_entropy, descend, top_scores, visited_scores, walk
from fastffn.nn.usage import add_counts, counts_of, occurrences, register_counts
from fastffn.ops import grouped_mlp, leaf_mixture
from fastffn.ops.activations import get_activation
from fastffn.ops.dispatch import autocast
from fastffn.ops.leaf_mixture.reference import path_weights
from fastffn.registry import register_ffn

if TYPE_CHECKING:
    from typing_extensions import Self

DECISIONS = ("soft", "hard", "straight_through")
# Node numbers stay below 2^31: they fit the 32-bit offsets of grouped products.
MAX_DEPTH = 30


@dataclass(frozen=True, kw_only=True)
class LeafTreeConfig(FFNConfig):
    """Configuration of the `leaf_tree` kind; see `FFNConfig` for the shared fields.

    Args:
        depth: levels of decisions; 2^depth leaves. 0 is a single leaf, a dense FFN. At most 30.
        gated: whether a third map of each leaf, `leaf_gate`, multiplies the hidden activations, as in Llama; the shared
            part is then gated too.
        leaf_width: W, hidden neurons of a leaf. None means 4 D / 2^depth: all leaves together as wide as a usual FFN.
        shared: width of a dense FFN that every token passes as well; 0 for none. With `leaf_width` here it is
            the master leaf of arXiv 2405.16836 (whose trainable mixing factor is absorbed by the weights).
        decisions: how they are taken in training. `soft`: all leaves, mixed (the published way). `hard`: one leaf; the
            nodes learn nothing from the task. `straight_through`: one leaf; the nodes get an estimated gradient.
        region_leak: probability with which a decision is turned round in training.
        leaf_dropout: probability with which a hidden activation of a leaf is dropped in soft training.
        hardening_weight: weight of the mean entropy of the decisions, which makes them firm. Published: 3.0 (MNIST).
        balance_weight: weight of a loss that is 1 where the tokens spread evenly over the leaves and grows with
            imbalance. Soft: L times the sum over the leaves of share of tokens times mean weight (arXiv 2405.16836).
            Hard: the same for the two sides of each visited node, averaged over the visits.
    """

    gated: bool = False
    depth: int = 4
    leaf_width: int | None = None
    shared: int = 0
    decisions: str = "soft"
    region_leak: float = 0.0
    leaf_dropout: float = 0.0
    hardening_weight: float = 0.0
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        """See `FFNConfig.__post_init__`."""
        super().__post_init__()
        if not isinstance(self.depth, int) or not 0 <= self.depth <= MAX_DEPTH:
            raise ConfigError(f"depth is {self.depth!r}; it must be a whole number from 0 to {MAX_DEPTH}.")
        if self.leaf_width is not None and (not isinstance(self.leaf_width, int) or self.leaf_width < 1):
            raise ConfigError(f"leaf_width is {self.leaf_width!r}; it must be a whole number of at least 1.")
        if not isinstance(self.shared, int) or self.shared < 0:
            raise ConfigError(f"shared is {self.shared!r}; it must be a whole number, 0 for no shared part.")
        if self.decisions not in DECISIONS:
            raise ConfigError(f"decisions is '{self.decisions}'; it must be one of {', '.join(DECISIONS)}.")
        if not 0.0 <= self.region_leak <= 1.0:
            raise ConfigError(f"region_leak is {self.region_leak}; it must be from 0 to 1.")
        if not 0.0 <= self.leaf_dropout < 1.0:
            raise ConfigError(f"leaf_dropout is {self.leaf_dropout}; it must be at least 0 and below 1.")
        if self.leaf_dropout and self.decisions != "soft":
            raise ConfigError(
                f"leaf_dropout is {self.leaf_dropout} and decisions '{self.decisions}'; leaves drop activations in "
                "soft training only. Use dropout, which drops elements of the output, or decisions='soft'."
            )
        for name in ("hardening_weight", "balance_weight"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be a number of at least 0.")

    def resolved(self) -> Self:
        """See `FFNConfig.resolved`."""
        config = super().resolved()
        assert config.d_model is not None
        width = config.leaf_width or max(1, 4 * config.d_model // 2**config.depth)
        return dataclasses.replace(config, leaf_width=width)

    @property
    def leaves(self) -> int:
        """L, the number of leaves."""
        return 2**self.depth

    @property
    def total_width(self) -> int:
        """See `FFNConfig.total_width`; decisions are not neurons."""
        assert self.leaf_width is not None
        return self.leaves * self.leaf_width + self.shared

    @property
    def active_width(self) -> int:
        """See `FFNConfig.active_width`: of evaluation."""
        assert self.leaf_width is not None
        return self.leaf_width + self.shared

    @classmethod
    def sizes_for(cls, dense: DenseConfig) -> list[Self]:
        """See `FFNConfig.sizes_for`: 16 leaves, with the shared part three eighths or half of the neurons."""
        width = dense.total_width
        sizes = [(width // 4, width // 8), (width // 4, width // 4)] if width >= 64 else []
        return [cls(depth=4, leaf_width=leaf, shared=shared) for shared, leaf in sizes]

    def shared_config(self) -> DenseConfig:
        """Configuration of the part that every token passes."""
        return DenseConfig(
            d_model=self.d_model, d_out=self.d_out, d_hidden=self.shared, activation=self.activation, gated=self.gated
        )


@register_ffn("leaf_tree", LeafTreeConfig)
class LeafTreeFFN(AuxiliaryLoss, FFN[LeafTreeConfig]):
    """Fast feedforward network: a tree of decisions picks one of 2^depth small MLPs.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of the parameters.
        node_weight: `[2^depth - 1, D]`; node_bias: `[2^depth - 1]`.
        leaf_up_weight: `[2^depth, W, D]`; leaf_up_bias: `[2^depth, W]`.
        leaf_down_weight: `[2^depth, O, W]`; leaf_down_bias: `[2^depth, O]`; optionally shared.*, a `dense`; gated adds
        leaf_gate_weight: `[2^depth, W, D]`; leaf_gate_bias: `[2^depth, W]`.
        leaf_usage (no part of the state dict): `[2^depth]`, tokens that ended at each leaf in training, counted by the
            hard decisions, whatever `decisions` says.
    Start values: uniform +-1/sqrt(D), those of `leaf_down` +-1/sqrt(W), as published.

    Raises:
        ShapeError: the last axis of `x` is not D.
        DtypeError: `x` is not floating-point.
    Cost: in evaluation and hard training `depth D + W (D + O)` multiply-adds a token (the first 5 levels are computed
    whole, 31 D); in soft training those of a dense FFN of width `2^depth W`, and `2^depth (D + O)`.
    A value of `x` that is not a number goes left at each node, and stays in its token.
    Reference: Belcak and Wattenhofer, Fast Feedforward Networks, arXiv 2308.14711.
    """

    leaf_usage: torch.Tensor

    def __init__(self, config: LeafTreeConfig) -> None:
        super().__init__(config)
        config = self.config
        assert config.d_model and config.d_out and config.leaf_width
        D, O, W, L = config.d_model, config.d_out, config.leaf_width, config.leaves  # noqa: E741
        self.node_weight = nn.Parameter(torch.empty(L - 1, D))
        self.node_bias = nn.Parameter(torch.empty(L - 1))
        self.leaf_up_weight = nn.Parameter(torch.empty(L, W, D))
        self.leaf_up_bias = nn.Parameter(torch.empty(L, W))
        self.leaf_down_weight = nn.Parameter(torch.empty(L, O, W))
        self.leaf_down_bias = nn.Parameter(torch.empty(L, O))
        self.leaf_gate_weight = nn.Parameter(torch.empty(L, W, D)) if config.gated else None
        self.leaf_gate_bias = nn.Parameter(torch.empty(L, W)) if config.gated else None
        self.shared = DenseFFN(config.shared_config()) if config.shared else None
        register_counts(self, "leaf_usage", L)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the published start values for nodes and leaves."""
        assert self.config.d_model and self.config.leaf_width
        into, out_of = self.config.d_model**-0.5, self.config.leaf_width**-0.5
        for parameter in (self.node_weight, self.node_bias, self.leaf_up_weight, self.leaf_up_bias):
            parameter.uniform_(-into, into)
        for parameter in (self.leaf_down_weight, self.leaf_down_bias):
            parameter.uniform_(-out_of, out_of)
        if self.leaf_gate_weight is not None and self.leaf_gate_bias is not None:
            self.leaf_gate_weight.uniform_(-into, into)
            self.leaf_gate_bias.uniform_(-into, into)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D] -> [..., O]`."""
        self.check_input(x)
        rows = x.reshape(-1, x.shape[-1])
        self.ask(None)
        if not self.training:
            y = self._one_leaf(rows, self.path(rows))
        elif self.config.decisions == "soft":
            y = self._soft(rows)
        else:
            y = self._hard(rows)
        if self.shared is not None:
            y = y + self.shared(rows)
        dropped: torch.Tensor = self.dropout(y)
        return dropped.view(*x.shape[:-1], dropped.shape[-1])

    def node_scores(self, x: torch.Tensor) -> torch.Tensor:
        """The scores of all nodes: `[..., D]` to `[..., 2^depth - 1]`; right where they are at least 0."""
        self.check_input(x)
        return F.linear(x, self.node_weight, self.node_bias)

    def leaf_weights(self, x: torch.Tensor) -> torch.Tensor:
        """The weight of each leaf in the soft mixture: `[..., D]` to `[..., 2^depth]`, with gradients."""
        return path_weights(self.node_scores(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], -1)

    def node_entropies(self, x: torch.Tensor) -> torch.Tensor:
        """The entropy of each decision, averaged over the tokens: `[..., D]` to `[2^depth - 1]`, with gradients."""
        return binary_entropy(self.node_scores(x).reshape(-1, self.config.leaves - 1)).mean(0)

    @torch.no_grad()
    def path(self, x: torch.Tensor) -> Path:
        """The hard decisions of tokens `[T, D]`, without a region leak."""
        x, weight, bias = _given(*autocast(x, self.node_weight, self.node_bias))
        depth = self.config.depth
        return descend(x, weight, bias, top_scores(x, weight, bias, depth), depth)

    @torch.no_grad()
    def decision_margins(self, x: torch.Tensor) -> torch.Tensor:
        """See `FFN.decision_margins`: the smallest score on the path."""
        if not self.config.depth:
            return super().decision_margins(x)
        return self.node_scores(x).gather(1, self.path(x).nodes).abs().amin(1)

    def dead_leaves(self, share: float = 0.0) -> list[int]:
        """Leaves that got at most `share` of an even share of the tokens counted in `leaf_usage`.

        All of them where nothing has been counted yet.
        """
        counts = counts_of(self, "leaf_usage").tolist()
        limit = share * sum(counts) / self.config.leaves
        return [leaf for leaf, count in enumerate(counts) if count <= limit]

    def usage_report(self) -> str:
        """How the tokens of training spread over the leaves, in one line."""
        counts = counts_of(self, "leaf_usage").tolist()
        tokens = sum(counts)
        if not tokens:
            return f"{self.config.leaves} leaves, no tokens counted yet"
        dead = self.dead_leaves()
        named = f" ({', '.join(map(str, dead[:16]))}{', ...' if len(dead) > 16 else ''})" if dead else ""
        return (
            f"{tokens:,} tokens over {self.config.leaves} leaves: {len(dead)} dead{named}, the busiest with "
            f"{max(counts) / tokens:.1%} of the tokens, {1 / self.config.leaves:.1%} being even"
        )

    def reset_usage(self) -> None:
        """Counts from zero again."""
        counts_of(self, "leaf_usage").zero_()

    @classmethod
    def from_fastfeedforward(
        cls, state: Mapping[str, torch.Tensor], *, activation: str = "relu", **fields: Any
    ) -> LeafTreeFFN:
        """A module with the weights of the published package's `FFF`; see `load_published`."""
        from fastffn.nn.published_leaf_tree import load_published

        return load_published(state, activation=activation, **fields)

    def to_fastfeedforward(self, *, usage: bool = False) -> dict[str, torch.Tensor]:
        """The state dict of the published package's `FFF` that computes the same; see `export_published`."""
        from fastffn.nn.published_leaf_tree import export_published

        return export_published(self, usage=usage)

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: LeafTreeConfig, inputs: torch.Tensor | None = None) -> Self:
        """Tokens `inputs [S, D]` parted by the neurons of `dense` that they use; see `nn/start/leaf_tree.py`.

        Without `leaf_width` a token evaluates a quarter of the neurons, the shared ones included.

        Raises:
            KindError: there are no inputs.
            ConfigError: the shared part is wider than `dense`.
        """
        from fastffn.nn.start.leaf_tree import start_leaf_tree
        from fastffn.nn.start.shown import start_module

        d_hidden = dense.config.total_width
        width = config.leaf_width or max(1, d_hidden // 4 - config.shared)
        fitted = dataclasses.replace(config.fitted_to(dense.config), leaf_width=width)
        return start_module(cls, fitted, start_leaf_tree, dense, inputs)

    def _soft(self, x: torch.Tensor) -> torch.Tensor:
        x, weight, bias = _given(*autocast(x, self.node_weight, self.node_bias))
        scores = F.linear(x, weight, bias)
        if self.config.region_leak:
            # 1 - sigmoid(s) is sigmoid(-s): a decision is turned round by its score's sign.
            scores = torch.where(torch.rand_like(scores) < self.config.region_leak, -scores, scores)
        leaf = walk(scores.detach(), self.config.depth)
        add_counts(self, "leaf_usage", leaf)
        self.ask(self._soft_loss(scores, leaf))
        kept = None
        if self.config.leaf_dropout:
            ones = x.new_ones(x.shape[0], *self.leaf_up_bias.shape)
            kept = F.dropout(ones, self.config.leaf_dropout)
        if self.leaf_gate_weight is not None:
            return self._gated_mixture(x, scores, kept)
        return leaf_mixture(
            x,
            scores,
            self.leaf_up_weight,
            self.leaf_up_bias,
            self.leaf_down_weight,
            self.leaf_down_bias,
            kept=kept,
            activation=self.config.activation,
        )

    def _gated_mixture(self, x: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """All leaves, mixed, with torch's own gradients: three times the memory of `leaf_mixture`."""
        assert self.leaf_gate_weight is not None and self.leaf_gate_bias is not None
        gate = F.linear(x, self.leaf_gate_weight.flatten(0, 1), self.leaf_gate_bias.flatten())
        up = F.linear(x, self.leaf_up_weight.flatten(0, 1), self.leaf_up_bias.flatten())
        weights = path_weights(scores.to(_wide(scores.dtype))).to(up.dtype)
        hidden = (get_activation(self.config.activation)(gate) * up).unflatten(1, self.leaf_up_bias.shape)
        hidden = hidden * (weights.unsqueeze(2) if kept is None else weights.unsqueeze(2) * kept)
        down = self.leaf_down_weight.transpose(0, 1).flatten(1)
        return F.linear(hidden.flatten(1), down) + weights @ self.leaf_down_bias.to(weights.dtype)

    def _hard(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        x, weight, bias = _given(*autocast(x, self.node_weight, self.node_bias))
        top = top_scores(x, weight, bias, config.depth)
        path = descend(x, weight, bias, top, config.depth, config.region_leak)
        add_counts(self, "leaf_usage", path.leaf)
        y = self._one_leaf(x, path)
        straight = config.decisions == "straight_through"
        if not (straight or config.hardening_weight or config.balance_weight) or not config.depth:
            return y
        scores = visited_scores(x, path, weight, bias, top)
        self.ask(self._hard_loss(scores, path))
        if straight:
            # The weight of the side that was taken.
            side = torch.sigmoid(torch.where(scores.detach() >= 0, scores, -scores).to(_wide(scores.dtype)))
            # 1 with the gradient of each side's weight.
            y = y * (1 + (side - side.detach()).sum(1, keepdim=True)).to(y.dtype)
        return y

    def _one_leaf(self, x: torch.Tensor, path: Path) -> torch.Tensor:
        return grouped_mlp(
            x,
            path.leaf,
            self.leaf_up_weight,
            self.leaf_up_bias,
            self.leaf_down_weight,
            self.leaf_down_bias,
            self.leaf_gate_weight,
            self.leaf_gate_bias,
            activation=self.config.activation,
        )

    def _soft_loss(self, scores: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor | None:
        config, tokens = self.config, max(scores.shape[0], 1)
        if not config.depth or not (config.hardening_weight or config.balance_weight):
            return None
        scores = scores.to(_wide(scores.dtype))
        loss = scores.new_zeros(())
        if config.hardening_weight:
            loss = loss + config.hardening_weight * binary_entropy(scores).sum() / (tokens * scores.shape[1])
        if config.balance_weight:
            share = occurrences(leaf, config.leaves).to(scores.dtype) / tokens
            weight = path_weights(scores).sum(0) / tokens
            loss = loss + config.balance_weight * config.leaves * (share * weight).sum()
        return loss

    def _hard_loss(self, scores: torch.Tensor, path: Path) -> torch.Tensor | None:
        """The losses of the visited nodes only: the others were not computed."""
        config, visits = self.config, max(scores.numel(), 1)
        if not (config.hardening_weight or config.balance_weight):
            return None
        scores = scores.to(_wide(scores.dtype))
        loss = scores.new_zeros(())
        if config.hardening_weight:
            loss = loss + config.hardening_weight * binary_entropy(scores).sum() / visits
        if config.balance_weight:
            # Of all visits of the same node, the share that went right, and the weight c of going there.
            went_right = scores.detach() >= 0
            nodes = path.nodes.flatten()
            rights = occurrences(nodes, config.leaves - 1, went_right.flatten())
            share = (rights / occurrences(nodes, config.leaves - 1).clamp_min(1))[path.nodes].to(scores.dtype)
            right = torch.sigmoid(scores)
            loss = loss + config.balance_weight * 2 * (share * right + (1 - share) * (1 - right)).sum() / visits
        return loss


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _given(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The same tensors, none of which is None."""
    return tuple(tensor for tensor in tensors if tensor is not None)
