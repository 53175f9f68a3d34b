"""What every FFN kind has in common: a frozen configuration, a module, and how it becomes dense again.

`x: [..., D] -> [..., O]`, D = d_model, O = d_out (D unless given), H = d_hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from fastffn.errors import ConfigError, DtypeError, KindError, ShapeError, did_you_mean
from fastffn.nn.sharding import is_sharded
from fastffn.ops.activations import get_activation

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle
    from typing_extensions import Self

    from fastffn.nn.dense import DenseConfig, DenseFFN


@dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """Fields that all kinds share.

    Widths may be left out: `fastffn.convert` reads them off the model, and `fastffn.build` wants at least
    `d_model`.

    Args:
        d_model: width D of the input.
        d_out: width O of the output; None means D.
        activation: a name from transformers' ACT2FN. `gelu` is the erf form, `gelu_new` the tanh form.
        dropout: probability with which an output element is dropped in training.
    """

    d_model: int | None = None
    d_out: int | None = None
    activation: str = "gelu"
    dropout: float = 0.0

    # Fields that come from the model when one is converted, not from the user.
    MODEL_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"d_model", "d_out", "d_hidden", "activation", "dropout", "bias", "gated"}
    )

    # Whether a module of this kind has weights that learn; else it is made from another one, to infer with.
    TRAINS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks each field on its own; what depends on widths is checked once they are known."""
        for name in ("d_model", "d_out", "d_hidden"):
            value = getattr(self, name, None)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1.")
        get_activation(self.activation)

    def resolved(self) -> Self:
        """The same configuration with every width filled in.

        Raises:
            ConfigError: `d_model` is missing, or a field does not fit the widths.
        """
        if self.d_model is None:
            raise ConfigError(
                f"{type(self).__name__} has no d_model; give it, as in "
                f"fastffn.build({type(self).__name__}(d_model=768)), or let fastffn.convert read it off a model."
            )
        return dataclasses.replace(self, d_out=self.d_out or self.d_model)

    @property
    def total_width(self) -> int:
        """Hidden neurons in all, of a resolved configuration: d_hidden of the dense FFN that it stands in for.

        Raises:
            KindError: this kind does not say.
        """
        raise KindError(f"{type(self).__name__} does not say how many neurons it has; give it a total_width.")

    @property
    def active_width(self) -> int:
        """Of those, the ones that a token evaluates."""
        return self.total_width

    @classmethod
    def sizes_for(cls, dense: DenseConfig) -> list[Self]:
        """Sizes worth trying in the place of an FFN, for a search within a budget of quality; none if not given."""
        return []

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that the user chooses: those that are not read off a model."""
        return [field.name for field in dataclasses.fields(cls) if field.name not in cls.MODEL_FIELDS]

    def check_pretraining(self) -> None:
        """Refuses choices with which a model cannot learn from random weights; there are none if not given.

        Raises:
            ConfigError: this is one.
        """

    def fitted_to(self, dense: FFNConfig) -> Self:
        """The same choices with the widths, activation, dropout, biases and gate of `dense`."""
        names = {field.name for field in dataclasses.fields(self)} & self.MODEL_FIELDS
        return dataclasses.replace(self, **{name: getattr(dense, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: a field is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{cls.__name__} has no field '{name}'; it has {', '.join(known)}.{did_you_mean(name, known)}"
                )
        return cls(**values)


class MergedTensor(NamedTuple):
    """How one tensor of the dense kind is computed from tensors of another kind.

    Without `combine` it *is* the one source, under another name: optimizer state may follow it.
    """

    sources: tuple[str, ...]
    combine: Callable[..., torch.Tensor] | None = None


C = TypeVar("C", bound=FFNConfig)


class FFN(nn.Module, Generic[C]):
    """A feed-forward network of some kind.

    Args:
        config: its configuration; missing widths are filled in.

    Attributes:
        config: the resolved configuration, every width known.
    """

    config: C

    # Biases that are not called so: no weight decay acts on them, as on others.
    BIASES: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: C) -> None:
        super().__init__()
        self.config = config.resolved()
        self.dropout = nn.Dropout(config.dropout)

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: C, inputs: torch.Tensor | None = None) -> Self:
        """A module of this kind that approximates `dense`; widths, activation and biases are `dense`'s.

        Args:
            dense: the FFN to approximate.
            config: the user's choices.
            inputs: `[S, D]`, tokens that `dense` meets in its model (`fastffn.convert` collects them): where the
                approximation is to be good. None if there are none.
        """
        raise KindError(f"{cls.__name__} cannot be made from a dense FFN.")

    @classmethod
    def merged_tensors(cls, config: C) -> dict[str, MergedTensor] | None:
        """For each tensor of the dense kind, how it is computed from this kind's; None if this kind cannot merge.

        Merging a module, merging a checkpoint tensor by tensor and carrying optimizer state over all read this.
        """
        return None

    def merge(self) -> DenseFFN:
        """The `dense` kind that computes the same function, up to rounding.

        Raises:
            KindError: this kind has no dense equivalent, or its parameters are spread over processes.
        """
        from fastffn.nn.dense import DenseConfig, DenseFFN

        recipe = self.merged_tensors(self.config)
        if recipe is None:
            raise KindError(f"{type(self).__name__} cannot be merged: no dense FFN computes the same function.")
        if any(is_sharded(parameter) for parameter in self.parameters()):
            raise KindError(
                f"{type(self).__name__} is sharded: its parameters are spread over processes, and would be dense and "
                "whole on each of them. Save a full state dict, and merge a model that has loaded it in one process."
            )
        with torch.device("meta"):
            dense = DenseFFN(DenseConfig().fitted_to(self.config))
        state = self.state_dict()
        merged = {
            name: rule.combine(*(state[source] for source in rule.sources))
            if rule.combine
            else state[rule.sources[0]].clone()
            for name, rule in recipe.items()
        }
        dense.load_state_dict(merged, assign=True)
        for parameter in dense.parameters():
            parameter.requires_grad_(True)
        return dense.train(self.training)

    def forward_out(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`forward` into memory that is there: `out [..., O]` is filled and returned. No gradient may be asked.

        Raises:
            KindError: this kind cannot.
        """
        raise KindError(f"{type(self).__name__} cannot write into memory that is given; leave out= away.")

    def decision_margins(self, x: torch.Tensor) -> torch.Tensor:
        """How far each token's nearest decision is from a tie: `[T, D]` to `[T]`, infinite where there is none.

        Two computations that round differently may send a token below their rounding another way.
        """
        return x.new_full((len(x),), float("inf"))

    def decay_product_(self, amount: float) -> None:
        """Decays what the factors multiply out to by `amount`, in place; nothing to do for other kinds."""

    @classmethod
    def tensor_parallel_plan(cls, config: C) -> dict[str, ParallelStyle]:
        """How to split a module of this kind over processes, for `parallelize_module`.

        Returns:
            A style for each of the module's parts by name; see `torch.distributed.tensor.parallel`.

        Raises:
            KindError: this kind cannot be split so.
        """
        raise KindError(
            f"{cls.__name__} has no tensor-parallel plan. torch.distributed.fsdp.fully_shard shards every kind that "
            "is trained; dense and low_rank have plans."
        )

    def check_input(self, x: torch.Tensor) -> None:
        """Raises ShapeError unless the last axis of `x` is d_model, DtypeError unless `x` is floating-point."""
        if not x.is_floating_point():
            raise DtypeError(
                f"{type(self).__name__} got an input of {x.dtype}; it must be floating-point: x.float() makes it so."
            )
        if x.shape[-1] != self.config.d_model:
            raise ShapeError(
                f"{type(self).__name__} got an input of shape {list(x.shape)}; its last axis must be "
                f"d_model={self.config.d_model}."
            )

    def extra_repr(self) -> str:
        """The configuration, for `print(model)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())
