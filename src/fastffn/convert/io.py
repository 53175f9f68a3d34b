"""Persistence: a model with FastFFN kinds is an ordinary Hugging Face checkpoint.

Its `config.json` holds a `quantization_config` with `quant_method: "fastffn"`, transformers' public hook for
checkpoints whose modules are not the model's own. Importing this file registers it; users write
`import fastffn.hf`.

    {"quant_method": "fastffn", "version": 1,
     "ffn": {"kind": "low_rank", "rank": 64, ...},            the kind of every FFN, widths left out ...
     "layers": {"transformer.h.0.mlp": null,                  ... except these: null is left as the model has it
                "transformer.h.1.mlp": {"kind": ...}}}

Without the import, transformers would merely warn and fill the missing dense weights with random numbers. So each
checkpoint also carries, under the dense tensors' names, tensors of a shape that fits nothing: transformers
refuses those, and the name of one more tensor in its report says what to do.
"""

from __future__ import annotations

import collections
import copy
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastffn.convert import api, match
from fastffn.convert.checks import check_ffns
from fastffn.errors import CheckpointError, ConfigError
from fastffn.nn import FFNConfig
from fastffn.nn.sharding import is_sharded
from fastffn.registry import get_kind, kind_of

QUANT_METHOD = "fastffn"
FORMAT_VERSION = 1
REMEDY_TENSOR = "_this_checkpoint_needs__import_fastffn.hf__before_from_pretrained"
# No weight of any model has this shape.
DECOY_SHAPE = (1, 1, 1, 1, 1, 1, 1)


def describe(config: FFNConfig) -> dict[str, Any]:
    """A kind and its fields as plain values, without those that are read off the model."""
    values = config.to_dict()
    return {"kind": kind_of(config).name} | {name: values[name] for name in config.own_fields()}


def undescribe(values: dict[str, Any]) -> FFNConfig:
    """The configuration that `describe` wrote."""
    values = dict(values)
    return get_kind(values.pop("kind", "")).config.from_dict(values)


@register_quantization_config(QUANT_METHOD)
class FastFFNConfig(QuantizationConfigMixin):
    """The FFN kinds of a model, for `from_pretrained(..., quantization_config=...)` and for `config.json`.

    Args:
        ffn: the configuration of every FFN, such as `LowRankConfig(rank=64)`, or its `describe`d form.
        layers: FFNs that differ, by path: another configuration, or None for an FFN left as the model has it.
        version: of the format on disk.

    Raises:
        CheckpointError: the checkpoint's format is newer than this FastFFN.
    """

    def __init__(
        self,
        ffn: FFNConfig | dict[str, Any],
        layers: dict[str, Any] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint's FastFFN format is version {version}, this FastFFN reads version {FORMAT_VERSION}; "
                "install the FastFFN that wrote it, or a newer one."
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # theirs is an enumeration, but any name works
        self.version = version
        self.ffn = describe(ffn) if isinstance(ffn, FFNConfig) else dict(ffn)
        self.layers = {
            path: describe(value) if isinstance(value, FFNConfig) else value for path, value in (layers or {}).items()
        }
        # Unknown kinds and fields are refused here, before any weight is touched.
        for values in (self.ffn, *self.layers.values()):
            if values is not None:
                undescribe(values)

    def config_for(self, path: str, model: nn.Module) -> FFNConfig | None:
        """The configuration of the FFN at `path` of `model`, None if it stays as the model has it."""
        layers = {relative_path(name, model): values for name, values in self.layers.items()}
        values = layers.get(relative_path(path, model), self.ffn)
        return None if values is None else undescribe(values)


def relative_path(path: str, model: nn.Module) -> str:
    """A path without the model's prefix: what `GPT2LMHeadModel` calls `transformer.h.0` is `h.0` to `GPT2Model`."""
    return path.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


@register_quantizer(QUANT_METHOD)
class FastFFNQuantizer(HfQuantizer):
    """Puts FastFFN's modules in place before a checkpoint's weights load, or converts once a dense one has loaded."""

    quantization_config: FastFFNConfig
    given_state: Mapping[str, torch.Tensor] | None = None  # what save_pretrained was given, while it runs

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            return model
        family = match.family_of(model.config)
        _check_layers(self.quantization_config, model, [path for path, _ in match.family_ffns(model, family)])
        decoys = [re.escape(REMEDY_TENSOR)]
        needed: list[str] = []
        for path, ffn in list(match.family_ffns(model, family)):
            config = self.quantization_config.config_for(path, model)
            if config is None:
                continue
            kind = kind_of(config)
            with torch.device("meta"):
                new = kind.module(config.fitted_to(family.dense_config(model, path)))
            new.to(next(ffn.parameters()).dtype)
            family.put_in(model, path, new)
            stem = relative_path(path, model)
            needed += [f"{stem}.{name}" for name in new.state_dict()]
            # The dense tensors' names are in the file only to stop those who did not import this.
            decoys += [rf"(^|\.){re.escape(where.at(stem))}$" for where in family.tensors.values()]
        _check_complete(model, needed, kwargs.get("checkpoint_files"))
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        model._keys_to_ignore_on_load_unexpected = set(ignored) | set(decoys)  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            _convert_as_described(model, self.quantization_config)
        else:
            attach(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors given to `save_pretrained`, or the model's; and those that stop transformers without FastFFN.

        Raises:
            CheckpointError: the model is sharded, and no full state dict was given.
        """
        family = match.family_of(model.config)
        state = dict(model.state_dict() if self.given_state is None else self.given_state)
        if any(is_sharded(tensor) for tensor in state.values()):
            raise CheckpointError(
                "The model is sharded: its tensors are spread over processes. Gather them in all of them, "
                "state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) "
                "of torch.distributed.checkpoint.state_dict, then save in one: "
                "model.save_pretrained(directory, state_dict=state)."
            )
        for path, _ in match.fastffn_modules(model):
            # One is enough to stop the loading, and weights are never optional.
            state[family.tensors["up.weight"].at(path)] = torch.zeros(DECOY_SHAPE)
        state[REMEDY_TENSOR] = torch.zeros(DECOY_SHAPE)
        return state, {}

    def is_serializable(self) -> bool:
        """Yes: the modules' own tensors are saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: the parameters are ordinary ones."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes, without adapters: the parameters are ordinary ones."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


class _SavePretrained:
    """A model's `save_pretrained`, which writes the state dict that it is given.

    transformers asks the quantizer for the tensors of a model that has one, and drops those that the caller gave:
    under FSDP the only whole ones. An object and not a function, so that models can be copied and pickled.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        quantizer: Any = self.model.hf_quantizer
        quantizer.given_state = state_dict
        try:
            save = type(self.model).save_pretrained
            return save(self.model, save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            quantizer.given_state = None


def _check_complete(model: nn.Module, needed: list[str], files: list[str] | None) -> None:
    """Raises CheckpointError if a tensor of our modules is in none of the files: transformers would make one up."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return
    stored = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored |= {relative_path(name, model) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    missing = [name for name in needed if name not in stored]
    if missing:
        raise CheckpointError(
            f"config.json promises FastFFN modules, but {len(missing)} of their tensors are missing (the first: "
            f"{missing[0]}). The weights belong to another model, or the checkpoint is not complete."
        )


def _check_layers(described: FastFFNConfig, model: nn.Module, paths: list[str]) -> None:
    """Raises CheckpointError if layers are described that the model does not have."""
    known = {relative_path(path, model) for path in paths}
    unknown = [path for path in described.layers if relative_path(path, model) not in known]
    if unknown:
        raise CheckpointError(
            f"The configuration describes FFNs that the model does not have: {', '.join(unknown)}. "
            f"It has {', '.join(paths)}."
        )


def _convert_as_described(model: nn.Module, described: FastFFNConfig) -> None:
    family = match.family_of(model.config)
    paths = [path for path, _ in match.family_ffns(model, family)]
    _check_layers(described, model, paths)
    configs = {path: config for path in paths if (config := described.config_for(path, model)) is not None}
    check_ffns(model, family, list(configs))
    for config in configs.values():
        api.check_kind(config)
    api.replace_ffns(model, configs)


def attach(model: nn.Module) -> None:
    """Makes a Hugging Face model that holds FastFFN modules save itself as one."""
    family = match.family_of(model.config)
    described = {path: describe(module.config) for path, module in match.fastffn_modules(model)}
    common = collections.Counter(json.dumps(values, sort_keys=True) for values in described.values())
    ffn: dict[str, Any] = json.loads(common.most_common(1)[0][0])
    layers: dict[str, Any] = {path: values for path, values in described.items() if values != ffn}
    layers |= {path: None for path, _ in match.family_ffns(model, family)}
    config = FastFFNConfig(ffn, layers)
    # The configuration may be shared with other models, which are none of our business.
    before: Any = model.config
    after = copy.deepcopy(before)
    after.quantization_config = config.to_dict()
    after._is_quantized = False
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = after
        # Parts that can be saved on their own (`model.transformer`) too.
        if isinstance(module, PreTrainedModel) and any(True for _ in match.fastffn_modules(module)):
            module.hf_quantizer = FastFFNQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
            # Nothing is quantized: .half(), .float() and torch.compile must go on working.
            module.is_quantized = False  # type: ignore[assignment]
            module.save_pretrained = _SavePretrained(module)  # type: ignore[method-assign]


def detach(model: nn.Module) -> None:
    """Takes every trace of FastFFN off a model whose FFNs are its own again."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("hf_quantizer", "quantization_method", "is_quantized", "save_pretrained"):
                vars(module).pop(name, None)
            for name in ("quantization_config", "_is_quantized"):
                vars(module.config).pop(name, None)


def described_in(config_json: dict[str, Any], where: str) -> FastFFNConfig:
    """The FFN kinds that a checkpoint's `config.json` describes.

    Raises:
        CheckpointError: it describes none.
    """
    values = config_json.get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where} holds no FastFFN kinds (its config.json has no quantization_config of method '{QUANT_METHOD}'): "
            "there are no factors to merge; it is dense already."
        )
    try:
        return FastFFNConfig(**values)
    except TypeError as error:
        raise ConfigError(f"The quantization_config of {where} is not FastFFN's: {error}.") from error
