"""A causal language model from a directory, with FastFFN kinds or dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastffn.convert.loading import load_model


def load_language_model(directory: Path) -> Any:
    """The model, on the accelerator if there is one, for evaluation.

    Raises:
        CheckpointError: its weights are missing or corrupt.
    """
    from transformers import AutoModelForCausalLM

    net = load_model(AutoModelForCausalLM, directory)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return net.to(device or "cpu").eval()
