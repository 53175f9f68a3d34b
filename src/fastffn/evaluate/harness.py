"""Tasks of EleutherAI's lm-evaluation-harness on a checkpoint, with FastFFN kinds or dense."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastffn.convert.loading import is_causal, read_config
from fastffn.data.tokenizer import load_tokenizer
from fastffn.errors import CheckpointError, ConfigError, DataError, MissingDependencyError, did_you_mean
from fastffn.evaluate.load import load_language_model
from fastffn.measure.machine import describe_machine


def evaluate_harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """Runs tasks of lm-eval, as they are defined there.

    Args:
        model: directory of a causal language model and its tokenizer.
        tasks: names of tasks or groups of lm-eval, or patterns such as `arc_*`.
        include_path: a folder of YAML files that define further tasks.
        limit: examples of each task at most, the first ones; None: all.
        batch: requests at a time.

    Returns:
        `results`: for each task and metric `value` and `stderr` (None where there is none); versions, number of
        examples, and what was used.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        CheckpointError: the model is missing, corrupt, or no causal language model.
        ConfigError: a task is unknown.
        DataError: a task's data cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"fastffn evaluate harness needs the package '{error.name}': pip install 'fastffn[eval]'."
        ) from error
    directory = Path(model)
    names = read_config(directory).get("architectures") or ["of an unknown class"]
    if not is_causal(names[0]):
        raise CheckpointError(f"{directory} is a model {names[0]}; lm-eval's tasks want a causal language model.")
    for name, value in (("limit", limit), ("batch_size", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path is {include_path}, which is no folder; name one of YAML files.")
    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    if not tasks:
        raise ConfigError("No task is named; name some with --tasks, such as hellaswag,arc_easy.")
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"lm-eval has no task '{name}'{f', nor has {include_path}' if include_path else ''}."
                f"{did_you_mean(name, manager.all_tasks)}"
            )
    net = load_language_model(directory)
    wrapped: Any = HFLM(
        pretrained=net, tokenizer=load_tokenizer(str(directory)), batch_size=batch, disable_tqdm=not sys.stderr.isatty()
    )
    try:
        found: Any = lm_eval.simple_evaluate(
            wrapped, tasks=manager.match_tasks(list(tasks)), task_manager=manager, limit=limit, log_samples=False
        )
    except OSError as error:  # what data sets raise whose files or hub cannot be reached
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"The data of {', '.join(tasks)} cannot be loaded: {reason}") from error
    return {
        "results": {task: _metrics(values) for task, values in found["results"].items()},
        "examples": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "task_versions": found["versions"],
        "few_shot": found["n-shot"],
        "limit": limit,
        "batch": batch,
        "model": str(directory),
        "lm_eval": lm_eval.__version__,
        "machine": describe_machine(),
    }


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`acc,none` and `acc_stderr,none` of lm-eval as one entry `acc`; filters other than `none` stay in the name."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not chosen:
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        found[name] = {"value": value, "stderr": error if isinstance(error, (int, float)) else None}
    return found
