"""The switch of stages: a checkpoint in, a checkpoint out, from which the Trainer goes on as if nothing had been.

The model changes its FFNs. Tensors that stay the same ones (attention, embeddings, the FFNs' biases) keep their
optimizer state, new ones begin without; schedule, step count, data order and random state pass over.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastffn.convert import match
from fastffn.convert.api import convert
from fastffn.convert.checkpoint import merge_checkpoint
from fastffn.convert.files import new_directory
from fastffn.convert.fresh import trained_model
from fastffn.errors import CheckpointError
from fastffn.nn import FFNConfig
from fastffn.train.trainer import StageTrainer

# Step count, history, random state and loss scale are the same ones before and after.
_CARRIED = ("trainer_state.json", "rng_state*.pth", "scaler.pt")


def merge_stage(source: Path, target: Path, make_trainer: Callable[[Path], StageTrainer] | None) -> dict[str, Any]:
    """Writes `target`, the merged model of the checkpoint `source`.

    Args:
        source: a Trainer checkpoint with factorised FFNs.
        target: directory to create: an ordinary dense checkpoint.
        make_trainer: makes the next stage's trainer for a model directory; None: the next stage starts afresh and
            only the model passes over.

    Returns:
        Number of layers and parameters, for the report.
    """
    with new_directory(target) as partial:
        merged = merge_checkpoint(source, partial)
        if make_trainer is not None:
            _carry_over(source, partial, make_trainer(partial), merged.same_tensors)
    return merged.summary()


def factorise_stage(
    source: Path,
    target: Path,
    config: FFNConfig,
    make_trainer: Callable[[Path], StageTrainer],
    *,
    dense_layers: int = 0,
) -> None:
    """Writes `target`: the dense checkpoint `source` with its FFNs, but for the first few, factorised."""
    model = trained_model(source)
    same = {name: name for name, _ in model.named_parameters()}
    family = match.family_of(model.config)
    convert(model, config, filter=match.after_first(model, dense_layers))
    for path, module in match.fastffn_modules(model):
        for name, rule in (module.merged_tensors(module.config) or {}).items():
            if rule.combine is None:
                same[f"{path}.{rule.sources[0]}"] = family.tensors[name].at(path)
    with new_directory(target) as partial:
        model.save_pretrained(partial)
        _carry_over(source, partial, make_trainer(partial), same)


def _carry_over(source: Path, target: Path, trainer: StageTrainer, same: dict[str, str]) -> None:
    """Writes the optimizer, schedule and Trainer state with which `trainer` goes on where `source` stopped."""
    old = _load(source / "optimizer.pt")
    states = {
        name: old["state"][number]
        for group in old["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if number in old["state"]
    }
    trainer.create_optimizer_and_scheduler(trainer.stage.total)
    optimizer: Any = trainer.optimizer
    scheduler: Any = trainer.lr_scheduler
    new = optimizer.state_dict()
    new["state"] = {
        number: states[same[name]]
        for group in new["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if same.get(name) in states
    }
    schedule = scheduler.state_dict()
    before = _load(source / "scheduler.pt")
    schedule.update({key: before[key] for key in ("last_epoch", "_step_count")})
    torch.save(new, target / "optimizer.pt")
    torch.save(schedule, target / "scheduler.pt")
    for pattern in _CARRIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {path.parent} is not a complete checkpoint.") from None
    except Exception as error:  # torch.load raises many types for a damaged file
        raise CheckpointError(f"{path} is corrupt or cut short ({type(error).__name__}: {error}).") from error
    return state
