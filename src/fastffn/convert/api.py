"""`fastffn.convert` and `fastffn.merge`: FFN kinds into a model in memory, and out of it again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastffn.convert import match
from fastffn.convert.calibration import Batch, check_enough, sample_inputs
from fastffn.convert.checks import check_ffns, check_model
from fastffn.convert.report import ConversionReport, LayerReport
from fastffn.convert.select import Filter, enumerated, select
from fastffn.errors import ConversionError, KindError
from fastffn.nn import FFN, FFNConfig
from fastffn.registry import kind_of

_log = logging.getLogger(__name__)


def convert(
    model: nn.Module,
    config: FFNConfig | Mapping[str, FFNConfig | None],
    *,
    calibration: Iterable[Batch] | None = None,
    filter: Filter | None = None,
) -> ConversionReport:
    """Replaces the FFNs of a Hugging Face model, in place, each by an approximation made from its weights.

    Args:
        model: a model of a known family (GPT-2, BERT, Llama, GPT-NeoX and their kin), its FFNs dense.
        config: the kind to put in, such as `LowRankConfig(rank=256)`. Widths, activation, dropout and biases are
            read off the model. Or one for each FFN by its path; those that are absent or None stay as they are.
        calibration: batches of the model's inputs, as mappings or as token numbers `[B, T]`. The model reads them
            once, and each FFN is approximated where its inputs are; without them everywhere alike.
        filter: which FFNs to replace: a pattern of their paths such as `transformer.h.[0-5].mlp`, several patterns,
            or a function that takes a path. The others stay as they are.

    Returns:
        What was replaced, layer by layer.

    Raises:
        ConversionError: the family is unknown, no FFN was found or selected; the model is converted or quantised
            already, has no values (device "meta"), or its FFNs share weights; or the calibration does not do. The
            model is as it was then.
        ConfigError: the configuration does not fit the model's widths.
        KindError: the kind cannot be made from a dense FFN.

    The model then saves and loads as an ordinary checkpoint (`import fastffn.hf` before `from_pretrained`).
    """
    family = match.family_of(getattr(model, "config", None))
    paths = [path for path, _ in match.family_ffns(model, family)]
    check_model(model)
    chosen = select(paths, config, filter)
    if not chosen:
        left = f", of which the filter took none: {enumerated(paths)}" if paths else ""
        raise ConversionError(
            f"No FFN to convert: looked for {family.ffn_class_name(model)} modules in {type(model).__name__} and found "
            f"{len(paths)}{left}."
        )
    check_ffns(model, family, list(chosen))
    for path, own in chosen.items():
        check_kind(own)
        own.fitted_to(family.dense_config(model, path)).resolved()
    inputs: dict[str, torch.Tensor] = {}
    if calibration is not None:
        inputs = sample_inputs(model, list(chosen), calibration)
        check_enough(inputs)
    return replace_ffns(model, chosen, inputs)


def check_kind(config: FFNConfig) -> None:
    """Raises KindError unless the configuration's kind can be made from a dense FFN."""
    kind = kind_of(config)
    if kind.module.from_dense.__func__ is FFN.from_dense.__func__:  # type: ignore[attr-defined]
        raise KindError(f"The kind '{kind.name}' cannot be made from a dense FFN; it is trained from the start.")


def replace_ffns(
    model: Any, configs: Mapping[str, FFNConfig], inputs: Mapping[str, torch.Tensor] | None = None
) -> ConversionReport:
    """`convert` without its checks: each FFN at a path becomes what the configuration says."""
    from fastffn.convert import io

    family = match.family_of(model.config)
    # All replacements are made before the first is put in: an error leaves the model as it was.
    replacements: dict[str, FFN[Any]] = {}
    layers = []
    for path, ffn in match.family_ffns(model, family):
        dense_config = family.dense_config(model, path)
        if path not in configs:
            layers.append(LayerReport(path, dense_config, None, "not selected"))
            continue
        config, parameters = configs[path], list(family.parameters(model, path).values())
        dense = family.to_dense(model, path)
        new = kind_of(config).module.from_dense(dense, config, (inputs or {}).get(path))
        new.to(dtype=parameters[0].dtype, device=parameters[0].device)
        if not any(parameter.requires_grad for parameter in parameters):
            new.requires_grad_(False)
        replacements[path] = new.train(ffn.training)
        layers.append(LayerReport(path, dense_config, new.config))
        _log.info("%s: %s (%d of %d)", path, kind_of(config).name, len(replacements), len(configs))
    for path, new in replacements.items():
        family.put_in(model, path, new)
    io.attach(model)
    return ConversionReport(tuple(layers))


def place_fresh(model: Any, config: FFNConfig, *, filter: Filter | None = None) -> None:
    """Puts a kind that will be trained from the start in the place of a model's FFNs.

    Kinds that merge start from the dense weights, for the same first function; others from values of their own.

    Args:
        model: a model of a known family, its FFNs dense and of no account.
        config: the kind to put in; widths, activation and dropout are read off the model.
        filter: see `convert`.
    """
    from fastffn.convert import io

    kind, family = kind_of(config), match.family_of(model.config)
    chosen = select([path for path, _ in match.family_ffns(model, family)], config, filter)
    configs = {path: config.fitted_to(family.dense_config(model, path)) for path in chosen}
    if all(kind.module.merged_tensors(fitted.resolved()) is not None for fitted in configs.values()):
        replace_ffns(model, chosen)
        return
    for path, fitted in configs.items():
        family.put_in(model, path, kind.module(fitted))
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
        # An FFN for inference has none: then those of the whole model tell.
        parameters = list(originals[path].parameters()) or list(model.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            dense.requires_grad_(False)
        if has_family:
            match.family_of(model_config).put_back(model, path, dense)
        else:
            match.replace_module(model, path, dense)
    if has_family:
        from fastffn.convert import io

        io.detach(model)
    return model
