"""Checkpoints in directories: what their config.json says, and their models, each fault named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastffn.convert.files import read_json
from fastffn.errors import CheckpointError, FastFFNError

# Directories in a run that hold what it was made for.
_RESULTS = ("student", "stage2")


def read_config(directory: Path, *, results: tuple[str, ...] = _RESULTS) -> dict[str, Any]:
    """The `config.json` of a checkpoint.

    Args:
        directory: the checkpoint's.
        results: directories of a run in which such checkpoints are, for who names the run instead.

    Raises:
        CheckpointError: there is no such directory, it is a run's, or the file is missing or corrupt.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; name the directory of a checkpoint.")
    if not (directory / "config.json").exists():
        for name in results:
            if (directory / name).is_dir():
                raise CheckpointError(f"{directory} is a run, not a checkpoint. Did you mean {directory / name}?")
    return read_json(directory / "config.json")


def model_class_of(config_json: dict[str, Any], where: object) -> Any:
    """The model class that a `config.json` names.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    import transformers

    names = config_json.get("architectures") or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise CheckpointError(f"config.json of {where} names no architecture that transformers knows: {names}.")
    return architecture


def longest_sequence(config: Any) -> int | None:
    """Tokens that the model of a transformers configuration takes at once; None if it does not say."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is not None and "roberta" in getattr(config, "model_type", ""):
        return limit - (config.pad_token_id or 0) - 1  # its positions begin after the padding token's number
    return limit


def is_causal(architecture: str) -> bool:
    """Whether the model class of that name is a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def load_model(architecture: Any, source: str | Path, **options: Any) -> Any:
    """`architecture.from_pretrained(source, **options)`, with or without FastFFN kinds.

    Raises:
        CheckpointError: weights are missing, or corrupt.
    """
    from safetensors import SafetensorError

    from fastffn.convert import io  # noqa: F401  (so that checkpoints with FastFFN kinds load)

    try:
        return architecture.from_pretrained(source, **options)
    except FastFFNError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The weights in {source} are missing, corrupt or cut short: {reason}") from error
