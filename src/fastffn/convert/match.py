"""Finding the FFNs of a model, and what a model family has to say about its own."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from fastffn.errors import ConversionError
from fastffn.nn import FFN, DenseConfig, DenseFFN


class ModelTensor(NamedTuple):
    """Where a family keeps one tensor of the dense kind.

    Attributes:
        name: its name inside the FFN, such as `c_fc.weight`.
        transposed: whether the family keeps it transposed.
        beside: whether it is outside the FFN module; the name then begins beside it, in the module that holds the FFN.
    """

    name: str
    transposed: bool = False
    beside: bool = False

    def convert(self, tensor: torch.Tensor) -> torch.Tensor:
        """Between the dense kind's layout and the family's; the same map both ways."""
        return tensor.T.contiguous() if self.transposed else tensor

    def at(self, path: str) -> str:
        """Its name in a model whose FFN is at `path`."""
        return f"{path.rpartition('.')[0] if self.beside else path}.{self.name}".lstrip(".")


class Family:
    """How one family of models stores its FFNs.

    A FastFFN module takes the place of the module at the FFN's path. Linear maps beside it become `nn.Identity`.

    Attributes:
        ffn_classes: for each `config.model_type` of the family, the class of its FFN modules.
        tensors: for each tensor of the dense kind, where the family keeps it; biases may be absent from a model.
        activation: the field of the model's configuration that names the activation.
        dropout: the field that holds the dropout inside the FFN module; None if there is none in it.
    """

    ffn_classes: ClassVar[Mapping[str, str]]
    tensors: ClassVar[Mapping[str, ModelTensor]]
    activation: ClassVar[str] = "hidden_act"
    dropout: ClassVar[str | None] = None

    def ffn_class_name(self, model: Any) -> str:
        """The class of the FFN modules of `model`."""
        return self.ffn_classes[model.config.model_type]

    def own_ffn(self, ffn_class: Callable[..., nn.Module], config: DenseConfig, model_config: Any) -> nn.Module:
        """A module of the family; called where tensors are made on device "meta"."""
        return ffn_class(model_config)

    def parameters(self, model: nn.Module, path: str) -> dict[str, nn.Parameter]:
        """The parameters of the FFN at `path` by their names in the dense kind, as far as the model has them."""
        found = {}
        for name, where in self.tensors.items():
            with contextlib.suppress(AttributeError):
                found[name] = model.get_parameter(where.at(path))
        return found

    def dense_config(self, model: nn.Module, path: str) -> DenseConfig:
        """The dense kind's configuration of the FFN at `path`."""
        model_config: Any = model.config
        found = self.parameters(model, path)
        shapes = {
            name: tuple(parameter.shape)[:: -1 if self.tensors[name].transposed else 1]
            for name, parameter in found.items()
        }
        return DenseConfig(
            d_model=shapes["up.weight"][1],
            d_hidden=shapes["up.weight"][0],
            d_out=shapes["down.weight"][0],
            activation=getattr(model_config, self.activation),
            dropout=getattr(model_config, self.dropout) if self.dropout else 0.0,
            bias="up.bias" in found,
            gated="gate.weight" in found,
        )

    def to_dense(self, model: nn.Module, path: str) -> DenseFFN:
        """The FFN at `path` as the dense kind, sharing memory where the layout allows."""
        with torch.device("meta"):
            dense = DenseFFN(self.dense_config(model, path))
        found = self.parameters(model, path)
        state = {name: self.tensors[name].convert(parameter.detach()) for name, parameter in found.items()}
        dense.load_state_dict(state, assign=True)
        return dense.train(model.get_submodule(path).training)

    def put_in(self, model: nn.Module, path: str, new: nn.Module) -> None:
        """Puts a FastFFN module in the place of the FFN at `path`."""
        for name in self.beside(path):
            replace_module(model, name, nn.Identity())
        replace_module(model, path, new)

    def put_back(self, model: nn.Module, path: str, dense: DenseFFN) -> None:
        """Puts the dense kind, as the family's own modules, in the place of a FastFFN module."""
        config = dense.config
        assert config.d_hidden and config.d_out
        with torch.device("meta"):
            own = self.own_ffn(self._ffn_class(model.config), config, model.config)
            beside = {name: nn.Linear(config.d_hidden, config.d_out, bias=config.bias) for name in self.beside(path)}
        for name, module in {path: own, **beside}.items():
            replace_module(model, name, module.train(dense.training))
        for name, parameter in dense.named_parameters():
            parent, _, leaf = self.tensors[name].at(path).rpartition(".")
            values = self.tensors[name].convert(parameter.detach())
            setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=parameter.requires_grad))

    def beside(self, path: str) -> list[str]:
        """Paths of the linear maps outside the FFN module."""
        return list({where.at(path).rpartition(".")[0]: None for where in self.tensors.values() if where.beside})

    def _ffn_class(self, model_config: Any) -> Callable[..., nn.Module]:
        model_type = model_config.model_type
        package = model_type.replace("-", "_")
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        found: Callable[..., nn.Module] = getattr(module, self.ffn_classes[model_type])
        return found


def family_of(model_config: Any) -> Family:
    """The family of a transformers configuration.

    Raises:
        ConversionError: the model has no configuration, or its type belongs to no known family.
    """
    return family_named(getattr(model_config, "model_type", None))


def family_named(model_type: str | None) -> Family:
    """The family of a `config.model_type`; raises as `family_of`."""
    from fastffn.convert.families import families

    known = {model_type: family for family in families() for model_type in family.ffn_classes}
    if model_type not in known:
        raise ConversionError(
            f"The model's type is {model_type!r}; FastFFN knows the FFNs of {', '.join(sorted(known))}. A new family "
            "is one file in fastffn/convert/families."
        )
    assert model_type is not None
    return known[model_type]


def family_ffns(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """`(path, module)` of every FFN of the family in `model`, in order."""
    ffn_class = family.ffn_class_name(model)
    for path, module in model.named_modules():
        # fully_shard puts a class of its own in front of the module's.
        if any(cls.__name__ == ffn_class for cls in type(module).__mro__):
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
