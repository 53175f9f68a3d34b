"""Where a stage of a run stands: done, to be gone on with, or to be begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastffn.convert.files import read_json
from fastffn.errors import CheckpointError
from fastffn.train import checkpoints, rundir
from fastffn.train.plan import Stage
from fastffn.train.processes import say


def where_it_stands(
    stage: Stage, directory: Path, *, carried: Path | None = None
) -> tuple[dict[str, Any] | None, Any, int]:
    """What a stage recorded if it is done, else the checkpoint to go on from (None: none) and that one's step.

    Args:
        stage: which.
        directory: the stage's.
        carried: a checkpoint of the stage before, to go on from where there is none of its own.

    Raises:
        CheckpointError: the model, or the checkpoint, is damaged.
    """
    record = rundir.finished_stage(directory)
    if record is not None:
        checkpoints.check_loadable(directory)
        say(f"{stage.name}: done before, {record['steps']} steps.")
        return record, None, stage.end
    checkpoint, ignored = checkpoints.newest_complete(directory)
    for sentence in ignored:
        say(sentence)
    if checkpoint is not None:
        say(f"{stage.name}: going on from {checkpoint.name}.")
    else:
        checkpoint = carried
    if checkpoint is None:
        return None, None, 0
    try:
        checkpoints.check_resumable(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Delete {checkpoint}: the same command then goes on from what was there before."
        ) from error
    return None, checkpoint, read_json(checkpoint / "trainer_state.json").get("global_step", 0)
