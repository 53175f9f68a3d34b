"""A causal language model from a directory, with FastFFN kinds or dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastffn.convert.files import read_json
from fastffn.errors import CheckpointError


def model_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model's directory.

    Raises:
        CheckpointError: there is none, or it is a run's directory.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; name the directory of a model.")
    if not (directory / "config.json").exists():
        for stage in ("stage2", "student"):
            if (directory / stage).is_dir():
                raise CheckpointError(f"{directory} is a run, not a model. Did you mean {directory / stage}?")
    return read_json(directory / "config.json")


def load_language_model(directory: Path) -> Any:
    """The model, on the accelerator if there is one, for evaluation.

    Raises:
        CheckpointError: its weights are missing or corrupt.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import fastffn.hf  # noqa: F401  (so that checkpoints with FastFFN kinds load)

    try:
        net: Any = AutoModelForCausalLM.from_pretrained(directory)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The weights in {directory} are missing, corrupt or cut short: {reason}") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return net.to(device or "cpu").eval()
