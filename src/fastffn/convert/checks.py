"""What a model must be before its FFNs can be replaced; each error says what to do."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastffn.convert.match import Family, fastffn_modules
from fastffn.errors import ConversionError
from fastffn.nn.sharding import is_sharded


def check_model(model: Any) -> None:
    """Raises ConversionError if the model is converted or quantised already."""
    if any(True for _ in fastffn_modules(model)):
        raise ConversionError("This model holds FastFFN modules already; fastffn.merge(model) makes it dense first.")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", None) or "a method that is not FastFFN's"
        raise ConversionError(
            f"The model is quantised ({getattr(method, 'value', method)}): its FFN weights are not plain numbers. Load "
            "it without quantisation (or call model.dequantize()), then convert it."
        )


def check_ffns(model: nn.Module, family: Family, paths: Sequence[str]) -> None:
    """Raises ConversionError unless the FFNs at `paths` are plain dense ones of their own whose weights are there."""
    names = collections.defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for path in paths:
        _check_ffn(model, family, path, names)


def _check_ffn(model: nn.Module, family: Family, path: str, names: dict[int, list[str]]) -> None:
    found = family.parameters(model, path)
    known = {where.at(path) for where in family.tensors.values()}
    for name in ("up.weight", "down.weight", *(["gate.weight"] if "gate.weight" in family.tensors else [])):
        parameter = found.get(name)
        if parameter is None or not parameter.is_floating_point():
            what = "no plain tensor" if parameter is None else f"of {parameter.dtype}"
            raise ConversionError(
                f"{family.tensors[name].at(path)} is {what}: the FFN is quantised, or changed by another library. "
                "Load the model with floating-point weights, convert it, and quantise what remains."
            )
    places = [path, *family.beside(path)]
    inside = [f"{place}.{name}" for place in places for name in model.get_submodule(place).state_dict()]
    unknown = [name for name in inside if name not in known]
    if unknown:
        raise ConversionError(
            f"The FFN {path} holds {', '.join(unknown[:3])}, which a plain FFN does not have. Merge adapters into the "
            "weights first (model.merge_and_unload() of PEFT)."
        )
    for parameter in found.values():
        if parameter.device.type == "meta":
            raise ConversionError(
                f"The weights of {path} are on the device 'meta': they have no values. Load the model's weights first."
            )
        if is_sharded(parameter):
            raise ConversionError(
                f"The weights of {path} are sharded over processes. Convert the model before fully_shard."
            )
        others = [name for name in names[id(parameter)] if name not in known]
        if others:
            raise ConversionError(
                f"The FFN {path} shares a weight with {', '.join(others[:3])}. Give each its own copy first "
                "(copy.deepcopy of the module), or leave out all that share it by a filter."
            )
