"""`fastffn.convert` and `fastffn.merge`: FFN kinds into a model in memory, and out of it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastffn.convert import match
from fastffn.errors import ConversionError
from fastffn.nn import FFNConfig
from fastffn.registry import kind_of


@dataclass(frozen=True)
class LayerReport:
    """What happened to one FFN.

    Attributes:
        path: where it is in the model.
        kind: what it is now, `left as it was` where a filter excluded it.
        parameters_before, parameters_after: number of its parameters.
    """

    path: str
    kind: str
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class ConversionReport:
    """What happened to every FFN of a model, in order."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines = [
            f"{layer.path}: {layer.kind}, {layer.parameters_before:,} -> {layer.parameters_after:,} parameters"
            for layer in self.layers
        ]
        before = sum(layer.parameters_before for layer in self.layers)
        after = sum(layer.parameters_after for layer in self.layers)
        return "\n".join([*lines, f"all FFNs: {before:,} -> {after:,} parameters"])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _as_trainable_as(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, frozen if `old` was."""
    if not any(parameter.requires_grad for parameter in old.parameters()):
        new.requires_grad_(False)
    return new


def convert(model: nn.Module, config: FFNConfig, *, filter: Callable[[str], bool] | None = None) -> ConversionReport:
    """Replaces the FFNs of a Hugging Face model, in place, each by an approximation made from its weights.

    Args:
        model: a model of a known family (GPT-2), its FFNs dense.
        config: the kind to put in, such as `LowRankConfig(rank=256)`. Widths, activation, dropout and biases are
            read off the model.
        filter: takes the path of an FFN (`transformer.h.0.mlp`); those for which it returns False stay as they are.

    Returns:
        What was replaced, layer by layer.

    Raises:
        ConversionError: the family is unknown, no FFN was found or selected, or the model is converted already.
        ConfigError: the configuration does not fit the model's widths.

    The model then saves and loads as an ordinary checkpoint (`import fastffn.hf` before `from_pretrained`).
    """
    from fastffn.convert import io

    model_config = getattr(model, "config", None)
    family = match.family_of(model_config)
    if any(True for _ in match.fastffn_modules(model)):
        raise ConversionError("This model holds FastFFN modules already; fastffn.merge(model) makes it dense first.")
    found = list(match.family_ffns(model, family))
    chosen = [(path, ffn) for path, ffn in found if filter is None or filter(path)]
    if not chosen:
        raise ConversionError(
            f"No FFN to convert: looked for {family.ffn_class} modules in {type(model).__name__} and found "
            f"{len(found)}{', of which the filter took none' if found else ''}."
        )
    kind = kind_of(config)
    # All replacements are made before the first is put in: an error leaves the model as it was.
    replacements = {}
    for path, ffn in chosen:
        dense = family.to_dense(ffn, model_config)
        replacements[path] = _as_trainable_as(ffn, kind.module.from_dense(dense, config))
    layers = []
    for path, ffn in found:
        new = replacements.get(path)
        if new is None:
            layers.append(LayerReport(path, "left as it was", _count(ffn), _count(ffn)))
            continue
        layers.append(LayerReport(path, kind.name, _count(ffn), _count(new)))
        match.replace_module(model, path, new)
    io.attach(model)
    return ConversionReport(tuple(layers))


def place_fresh(model: Any, config: FFNConfig, *, filter: Callable[[str], bool] | None = None) -> None:
    """Puts a kind that will be trained from the start in the place of a model's FFNs.

    Kinds that merge start from the dense weights, for the same first function; others from values of their own.

    Args:
        model: a model of a known family, its FFNs dense and of no account.
        config: the kind to put in; widths, activation and dropout are read off the model.
        filter: see `convert`.
    """
    from fastffn.convert import io

    kind, family = kind_of(config), match.family_of(model.config)
    chosen = [(path, ffn) for path, ffn in match.family_ffns(model, family) if filter is None or filter(path)]
    configs = {path: config.fitted_to(family.dense_config(ffn, model.config)) for path, ffn in chosen}
    if all(kind.module.merged_tensors(fitted.resolved()) is not None for fitted in configs.values()):
        convert(model, config, filter=filter)
        return
    for path, fitted in configs.items():
        match.replace_module(model, path, kind.module(fitted))
    io.attach(model)


def merge(model: nn.Module) -> nn.Module:
    """Makes every factorised FFN of a model dense again, in place.

    A Hugging Face model gets its own FFN modules back and keeps no trace of FastFFN; in any other module the
    `dense` kind takes the factors' place.

    Args:
        model: a model that holds FastFFN modules, or is one.

    Returns:
        The model; a new module if `model` itself is an FFN.

    Raises:
        ConversionError: there is nothing to merge.
        KindError: a kind has no dense equivalent.
    """
    modules = list(match.fastffn_modules(model))
    if not modules:
        raise ConversionError(f"Nothing to merge: {type(model).__name__} holds no FastFFN module.")
    merged = {path: module.merge() for path, module in modules}
    originals = dict(modules)
    if "" in merged:
        return merged[""]
    model_config: Any = getattr(model, "config", None)
    has_family = hasattr(model_config, "model_type")
    for path, dense in merged.items():
        own = match.family_of(model_config).from_dense(dense, model_config) if has_family else dense
        match.replace_module(model, path, _as_trainable_as(originals[path], own))
    if has_family:
        from fastffn.convert import io

        io.detach(model)
    return model
