"""Finding the FFNs of a model, and what a model family has to say about its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from fastffn.errors import ConversionError
from fastffn.nn import FFN, DenseConfig, DenseFFN


class ModelTensor(NamedTuple):
    """Where a family keeps one tensor of the dense kind: its name inside the FFN, and whether it is transposed."""

    name: str
    transposed: bool = False

    def convert(self, tensor: torch.Tensor) -> torch.Tensor:
        """Between the dense kind's layout and the family's; the same map both ways."""
        return tensor.T.contiguous() if self.transposed else tensor


class Family:
    """How one family of models stores its FFNs.

    Attributes:
        model_types: values of `config.model_type` that belong to the family.
        ffn_class: name of the class of its FFN modules.
        tensors: for each tensor of the dense kind, where the family keeps it.
    """

    model_types: ClassVar[tuple[str, ...]]
    ffn_class: ClassVar[str]
    tensors: ClassVar[Mapping[str, ModelTensor]]

    def dense_config(self, ffn: Any, model_config: Any) -> DenseConfig:
        """The dense kind's configuration of a module of the family."""
        raise NotImplementedError

    def empty_ffn(self, config: DenseConfig, model_config: Any) -> nn.Module:
        """A module of the family without weights (on device "meta")."""
        raise NotImplementedError

    def to_dense(self, ffn: nn.Module, model_config: Any) -> DenseFFN:
        """The family's module as the dense kind, sharing memory where the layout allows."""
        with torch.device("meta"):
            dense = DenseFFN(self.dense_config(ffn, model_config))
        state = ffn.state_dict()
        dense.load_state_dict(
            {name: where.convert(state[where.name]) for name, where in self.tensors.items() if where.name in state},
            assign=True,
        )
        return dense.train(ffn.training)

    def from_dense(self, dense: DenseFFN, model_config: Any) -> nn.Module:
        """The dense kind as the family's own module."""
        ffn = self.empty_ffn(dense.config, model_config)
        state = dense.state_dict()
        ffn.load_state_dict(
            {where.name: where.convert(state[name]) for name, where in self.tensors.items() if name in state},
            assign=True,
        )
        for parameter in ffn.parameters():
            parameter.requires_grad_(True)
        return ffn.train(dense.training)


def family_of(model_config: Any) -> Family:
    """The family of a transformers configuration.

    Raises:
        ConversionError: the model has no configuration, or its type belongs to no known family.
    """
    from fastffn.convert.families import families

    known = {model_type: family for family in families() for model_type in family.model_types}
    model_type = getattr(model_config, "model_type", None)
    if model_type not in known:
        raise ConversionError(
            f"The model's type is {model_type!r}; FastFFN knows the FFNs of {', '.join(sorted(known))}. A new family "
            "is one file in fastffn/convert/families."
        )
    return known[model_type]


def family_ffns(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """`(path, module)` of every FFN of the family in `model`, in order."""
    for path, module in model.named_modules():
        # fully_shard puts a class of its own in front of the module's.
        if any(cls.__name__ == family.ffn_class for cls in type(module).__mro__):
            yield path, module


def after_first(model: Any, count: int) -> Callable[[str], bool]:
    """A filter of paths that leaves out the first `count` FFNs of a model of a known family."""
    first = {path for path, _ in list(family_ffns(model, family_of(model.config)))[:count]}
    return lambda path: path not in first


def fastffn_modules(model: nn.Module) -> Iterator[tuple[str, FFN[Any]]]:
    """`(path, module)` of every FastFFN module in `model`, in order; not of those that are part of another one."""
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and (inside == "" or path.startswith(inside + ".")):
            continue
        if isinstance(module, FFN):
            inside = path
            yield path, module


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` where `path` leads."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
