"""The weight transform on disk: a factorised checkpoint in, an ordinary dense one out, tensor by tensor."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastffn.convert import io, match
from fastffn.convert.files import new_directory, write_json
from fastffn.convert.loading import model_class_of, read_config
from fastffn.convert.safetensors_io import INDEX, PlannedTensor, TensorReader, write_checkpoint
from fastffn.errors import KindError
from fastffn.nn import MergedTensor
from fastffn.registry import kind_of

# Written by training, not part of the model; `merge` leaves them behind.
_TRAINING_FILES = {"conversion.json", "trainer_state.json", "stage.json", "complete.json", "config.json", INDEX}
MODEL_FILE_SUFFIXES = {".json", ".txt", ".model", ".jinja"}


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_checkpoint` did.

    Attributes:
        layers: paths of the FFNs that became dense.
        parameters_before, parameters_after: of the whole model.
        same_tensors: new name -> old name of every tensor that is the same one as before (biases, attention, ...).
    """

    layers: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    same_tensors: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Layers and parameters, for JSON."""
        return {
            "layers": list(self.layers),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }


def skeleton(config_json: dict[str, Any], where: str) -> torch.nn.Module:
    """The dense model that a `config.json` describes, without weights.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    architecture = model_class_of(config_json, where)
    plain = {key: value for key, value in config_json.items() if key != "quantization_config"}
    with torch.device("meta"):
        model: torch.nn.Module = architecture(architecture.config_class.from_dict(plain))
    return model


def merge_checkpoint(source: Path, target: Path, *, max_shard_bytes: int = 50_000_000_000) -> MergedCheckpoint:
    """Multiplies out the factors of a checkpoint; memory is that of the largest matrix (and its float64 product).

    Args:
        source: directory of a checkpoint with factorised FFNs.
        target: directory to create; it gets an ordinary checkpoint with no trace of FastFFN, and the tokenizer's
            files. It appears whole or not at all.
        max_shard_bytes: a larger model is written in several files.

    Raises:
        CheckpointError: `source` is missing, corrupt, or holds no factors.
        KindError: a kind in it has no dense equivalent.
        OutputError: `target` exists already.
    """
    source, target = Path(source), Path(target)
    config_json = read_config(source, results=("stage1",))
    described = io.described_in(config_json, str(source))
    model = skeleton(config_json, str(source))
    model_config: Any = model.config
    family = match.family_of(model_config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    recipe: dict[str, tuple[MergedTensor, match.ModelTensor]] = {}
    layers = []
    for path, _ in match.family_ffns(model, family):
        config = described.config_for(path, model)
        if config is None:
            continue
        kind = kind_of(config)
        dense = family.dense_config(model, path)
        rules = kind.module.merged_tensors(config.fitted_to(dense).resolved())
        if rules is None:
            raise KindError(f"{path} is of kind '{kind.name}', for which there is no equal dense FFN: not merged.")
        layers.append(path)
        for name, rule in rules.items():
            where = family.tensors[name]
            sources = tuple(f"{path}.{source_name}" for source_name in rule.sources)
            recipe[where.at(path)] = (MergedTensor(sources, rule.combine), where)

    reader = TensorReader(source)
    used = {name for rule, _ in recipe.values() for name in rule.sources} | {io.REMEDY_TENSOR}
    plan: list[PlannedTensor] = []
    same: dict[str, str] = {}
    for name in reader.names:
        if name not in used and name not in recipe:
            plan.append(PlannedTensor(name, *reader.dtype_and_shape(name), partial(reader.read, name)))
            same[name] = name
    for name, (rule, where) in recipe.items():
        dtype, _ = reader.dtype_and_shape(rule.sources[-1])
        plan.append(PlannedTensor(name, dtype, shapes[name], partial(_merged, reader, rule, where)))
        if rule.combine is None:
            same[name] = rule.sources[0]

    with new_directory(target) as partial_target:
        write_checkpoint(partial_target, plan, max_shard_bytes)
        dense_json = copy.deepcopy(config_json)
        del dense_json["quantization_config"]
        write_json(partial_target / "config.json", dense_json)
        copy_model_files(source, partial_target)
    decoys = {name for name in reader.names if name == io.REMEDY_TENSOR or name in recipe}
    before = sum(torch.Size(reader.dtype_and_shape(name)[1]).numel() for name in reader.names if name not in decoys)
    after = sum(torch.Size(tensor.shape).numel() for tensor in plan)
    return MergedCheckpoint(tuple(layers), before, after, same)


def copy_model_files(source: Path, target: Path) -> None:
    """Copies what lies beside a model's weights (tokenizer, generation settings), but for what `target` has already."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in MODEL_FILE_SUFFIXES and file.name not in _TRAINING_FILES
        if wanted and file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _merged(reader: TensorReader, rule: MergedTensor, where: match.ModelTensor) -> torch.Tensor:
    sources = [reader.read(name) for name in rule.sources]
    return where.convert(rule.combine(*sources) if rule.combine else sources[0])
