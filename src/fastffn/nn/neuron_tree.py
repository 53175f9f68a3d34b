"""The `neuron_tree` kind: conditional trees of neurons (UltraFastBERT, arXiv 2311.10770).

P = trees, N = 2**(depth + 1) - 1 neurons each, of which a token visits depth + 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fastffn import ops
from fastffn.errors import CheckpointError, ConfigError
from fastffn.nn.base import FFN, FFNConfig
from fastffn.nn.dense import DenseConfig, DenseFFN
from fastffn.ops.neuron_tree import reference
from fastffn.ops.neuron_tree.request import MAX_DEPTH
from fastffn.registry import register_ffn

if TYPE_CHECKING:
    from typing_extensions import Self

STARTS = ("published", "normal")
# Standard deviation of GPT-2's start values.
NORMAL = 0.02


@dataclass(frozen=True, kw_only=True)
class NeuronTreeConfig(FFNConfig):
    """Configuration of the `neuron_tree` kind; see `FFNConfig` for the shared fields.

    Args:
        depth: levels below the root, from 0 to 30; each token evaluates `depth + 1` neurons of each tree's
            `2**(depth + 1) - 1`.
        trees: number of trees, whose outputs are added.
        shared: hidden width of a dense FFN that every token goes through beside the trees; 0 for none.
        straight_through: whether decisions get a gradient, as if they had been weights sigmoid(s) and 1 - sigmoid(s).
        start: start values: `published` (uniform +-1/sqrt(D), w_out +-1/sqrt((depth + 1) trees)) or `normal` (standard
            deviation 0.02, biases zero, as in GPT-2: a smaller first output).
    """

    depth: int = 11
    trees: int = 1
    shared: int = 0
    straight_through: bool = False
    start: str = "published"

    def __post_init__(self) -> None:
        """See `FFNConfig.__post_init__`."""
        super().__post_init__()
        for name, low in (("depth", 0), ("trees", 1), ("shared", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {low}.")
        if self.depth > MAX_DEPTH:
            raise ConfigError(
                f"depth is {self.depth}; it must be at most {MAX_DEPTH}, so that numbers of nodes fit 32 bits."
            )
        if self.start not in STARTS:
            raise ConfigError(f"start is '{self.start}'; it must be one of {', '.join(STARTS)}.")

    @property
    def neurons(self) -> int:
        """Neurons in all trees."""
        return self.trees * (2 ** (self.depth + 1) - 1)

    @property
    def active_neurons(self) -> int:
        """Neurons that a token evaluates, those of the shared part included."""
        return self.trees * (self.depth + 1) + self.shared

    @property
    def total_width(self) -> int:
        """See `FFNConfig.total_width`."""
        return self.neurons + self.shared

    @property
    def active_width(self) -> int:
        """See `FFNConfig.active_width`."""
        return self.active_neurons

    def fitted_to(self, dense: FFNConfig) -> Self:
        """See `FFNConfig.fitted_to`; refuses a gated `dense`."""
        if getattr(dense, "gated", False):
            raise ConfigError(
                "neuron_tree has no gated form: a neuron's score is its gate and its decision. Use another kind for "
                "this model, such as low_rank or block."
            )
        return super().fitted_to(dense)


@register_ffn("neuron_tree", NeuronTreeConfig)
class NeuronTreeFFN(FFN[NeuronTreeConfig]):
    """Binary trees of neurons: of each tree a token evaluates one path, `s = <x, w_in[n]> + b_in[n]`, right if s > 0.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of the parameters.
        w_in: `[P, N, D]`; b_in: `[P, N]`; w_out: `[P, N, O]`; with `shared` also `shared.*`, a `dense` FFN.
    Start values: uniform +-1/sqrt(D), w_out +-1/sqrt((depth + 1) P), as published, or normal (`start`).

    Raises:
        ShapeError: the last axis of `x` is not D.
    Cost: `P (depth + 1) (D + O)` multiply-adds a token, and those of the shared part.
    Gradient: through the visited neurons; decisions have none unless `straight_through`.
    """

    BIASES: ClassVar[frozenset[str]] = frozenset({"b_in"})

    shared: DenseFFN | None

    def __init__(self, config: NeuronTreeConfig) -> None:
        super().__init__(config)
        config = self.config
        assert config.d_model and config.d_out
        nodes = config.neurons // config.trees
        self.w_in = nn.Parameter(torch.empty(config.trees, nodes, config.d_model))
        self.b_in = nn.Parameter(torch.empty(config.trees, nodes))
        self.w_out = nn.Parameter(torch.empty(config.trees, nodes, config.d_out))
        self.shared = self.shared_part(config)
        self.reset_parameters()

    @staticmethod
    def shared_part(config: NeuronTreeConfig) -> DenseFFN | None:
        """The dense FFN beside the trees of a resolved configuration, None if it has none."""
        if not config.shared:
            return None
        dense = DenseConfig(
            d_model=config.d_model, d_out=config.d_out, d_hidden=config.shared, activation=config.activation
        )
        return DenseFFN(dense)

    def reset_parameters(self) -> None:
        """Draws the start values of the trees."""
        if self.config.start == "normal":
            nn.init.normal_(self.w_in, std=NORMAL)
            nn.init.zeros_(self.b_in)
            nn.init.normal_(self.w_out, std=NORMAL)
            return
        start = 1 / math.sqrt(self.w_in.shape[2])
        nn.init.uniform_(self.w_in, -start, start)
        nn.init.uniform_(self.b_in, -start, start)
        start = 1 / math.sqrt((self.config.depth + 1) * self.config.trees)
        nn.init.uniform_(self.w_out, -start, start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D] -> [..., O]`."""
        self.check_input(x)
        # A kernel takes as long as two lookups by nn.Module, which first look everywhere else.
        own = self._parameters
        w_in, b_in, w_out = own.get("w_in"), own.get("b_in"), own.get("w_out")
        if w_in is None or b_in is None or w_out is None:  # pruned, parametrised, or somebody else's for the moment
            w_in, b_in, w_out = self.w_in, self.b_in, self.w_out
        y = ops.neuron_tree(
            x,
            w_in,
            b_in,
            w_out,
            self.config.activation,
            straight_through=self.config.straight_through,
        )
        if self.shared is not None:
            y = y + self.shared(x)
        return self.dropout(y) if self.training and self.dropout.p else y  # calls cost as much as a tree

    def forward_out(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """See `FFN.forward_out`; without dropout."""
        self.check_input(x)
        ops.neuron_tree(x, self.w_in, self.b_in, self.w_out, self.config.activation, out=out)
        return out if self.shared is None else out.add_(self.shared(x))

    @torch.no_grad()
    def decision_margins(self, x: torch.Tensor) -> torch.Tensor:
        """See `FFN.decision_margins`: the smallest score but for the last level's, which decides nothing."""
        _, scores, _ = reference.neuron_tree(x, self.w_in, self.b_in, self.w_out, self.config.activation)
        nearest = scores[..., :-1].abs().amin((0, 2)) if self.config.depth else super().decision_margins(x)
        return nearest

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: NeuronTreeConfig, inputs: torch.Tensor | None = None) -> Self:
        """Trees taught what `dense` does with tokens `inputs [S, D]`; see `nn/start/neuron_tree.py`.

        Raises:
            KindError: there are no inputs.
            ConfigError: `dense` is gated, or the shared part is wider than it.
        """
        from fastffn.nn.start.neuron_tree import start_neuron_tree
        from fastffn.nn.start.shown import start_module

        return start_module(cls, config.fitted_to(dense.config), start_neuron_tree, dense, inputs)

    @classmethod
    def from_ultrafastbert(
        cls, state: Mapping[str, torch.Tensor], *, depth: int | None = None, activation: str = "gelu"
    ) -> Self:
        """A module with the weights of one published layer (github.com/pbelcak/UltraFastBERT); they are copied.

        Args:
            state: state dict of one `FFF`: of the training module (`linear_in.weight [P N, D]`, `linear_in.bias`,
                `linear_out.weight [O, P N]`) or of a benchmark (`w1s [N, D]`, or `[N D, 1]` in the sparse one, and
                `w2s [N, O]`; no biases: ours are zero). Other layers' keys must be gone and prefixes taken off.
            depth: of the trees. The training module's tensors do not tell it: 4095 neurons are one tree of depth 11
                or 65 of depth 5. A benchmark's do.
            activation: which they do not tell either; all published weights have GELU.

        Raises:
            CheckpointError: the keys or shapes are of no published layer, or `depth` is missing or does not fit.
            ConfigError: `depth` is no possible depth, or the activation is unknown.

        The benchmarks send a score of exactly zero to the right, we to the left, as the training module does.
        """
        if "w1s" in state and "w2s" in state and "node_weights" not in state:
            w_out = state["w2s"]
            w_in = state["w1s"].reshape(len(w_out), -1) if state["w1s"].shape[-1] == 1 else state["w1s"]
            b_in = w_in.new_zeros(len(w_in))
            if depth is None:
                depth = len(w_out).bit_length() - 1
        elif "linear_in.weight" in state and "linear_out.weight" in state:
            w_in, w_out = state["linear_in.weight"], state["linear_out.weight"].T
            b_in = state.get("linear_in.bias", w_in.new_zeros(len(w_in)))
            if depth is None:
                raise CheckpointError(
                    f"The state dict holds {len(w_in)} neurons and does not tell in how many trees; give depth=."
                )
        elif "node_weights" in state:
            raise CheckpointError(
                "The state dict is a leaf tree's, of the package fastfeedforward, whose class bears the same name; "
                "load it into the kind leaf_tree."
            )
        else:
            raise CheckpointError(
                f"The state dict holds {', '.join(sorted(state)) or 'nothing'}; expected are linear_in.weight, "
                "linear_in.bias and linear_out.weight, or w1s and w2s. Take prefixes off the keys first."
            )
        if w_in.dim() != 2 or w_out.dim() != 2 or len(w_in) != len(w_out) or b_in.shape != (len(w_in),):
            raise CheckpointError(
                f"The tensors do not fit each other: neurons read {list(w_in.shape)}, have {list(b_in.shape)} biases "
                f"and write {list(w_out.shape)}."
            )
        config = NeuronTreeConfig(d_model=w_in.shape[1], d_out=w_out.shape[1], depth=depth, activation=activation)
        trees, rest = divmod(len(w_in), config.neurons)
        if rest or not trees:
            raise CheckpointError(
                f"{len(w_in)} neurons are no whole number of trees of depth {depth}, {config.neurons} neurons each."
            )
        config = dataclasses.replace(config, trees=trees)
        with torch.device("meta"):
            ffn = cls(config)
        tensors = {"w_in": w_in, "b_in": b_in, "w_out": w_out}
        ffn.load_state_dict(
            {
                name: tensor.detach().clone(memory_format=torch.contiguous_format).view(getattr(ffn, name).shape)
                for name, tensor in tensors.items()
            },
            assign=True,
        )
        return ffn.requires_grad_(True)
