"""Converting a checkpoint into another one: load, change, save, all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastffn.convert.checkpoint import MODEL_FILE_SUFFIXES, copy_model_files
from fastffn.convert.files import new_directory
from fastffn.convert.loading import load_model, model_class_of, read_config
from fastffn.errors import CheckpointError, ConversionError

_log = logging.getLogger(__name__)

# Loads a model's weights in the dtype that they are stored in.
STORED = "auto"


class Report(Protocol):
    """What a conversion has to tell."""

    def save(self, directory: Path) -> None:
        """Writes it beside the model."""


R = TypeVar("R", bound=Report)


def convert_checkpoint(source: str, target: Path, change: Callable[[Any, Path], R], *, dtype: str = STORED) -> R:
    """Writes the checkpoint `target`: the model in `source` after `change`, with its tokenizer's files.

    Args:
        source: directory of a dense checkpoint, or a name that transformers can load.
        target: directory to create. It appears whole or not at all.
        change: takes the loaded model and the directory it came from, and replaces FFNs of the model. What it returns
            is saved beside the model.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for that of the checkpoint.

    Returns:
        What `change` returned.

    Raises:
        CheckpointError: there is no such checkpoint, or it is corrupt.
        ConversionError: its FFNs are not dense ones.
        OutputError: `target` exists already.
    """
    with new_directory(Path(target)) as partial:
        directory = checkpoint_directory(source)
        model = load_dense(source, directory, dtype)
        report = change(model, directory)
        _log.info("writing %s", target)
        model.save_pretrained(partial)
        report.save(partial)
        copy_model_files(directory, partial)
    return report


def checkpoint_directory(source: str) -> Path:
    """The directory in which a checkpoint's files are, those of a hub's name but for its weights.

    Raises:
        CheckpointError: there is none.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    directory = Path(source).expanduser()
    if directory.suffix == ".gguf" and directory.is_file():
        raise CheckpointError(
            f"{source} is a GGUF file, whose weights are quantised. Write it as an ordinary checkpoint first, in "
            "float32: docs/convert.md says how (GgufConfig(dequantize=True))."
        )
    if directory.is_dir():
        return directory
    if directory.exists() or source.startswith((".", "/", "~")):
        raise CheckpointError(f"{source} is not a directory; name the directory of a checkpoint.")
    try:
        directory = Path(str(cached_file(source, "config.json"))).parent  # its errors say what to do
        snapshot_download(source, allow_patterns=[f"*{suffix}" for suffix in sorted(MODEL_FILE_SUFFIXES)])
        return directory
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} is neither a directory nor a model that can be loaded: {reason}") from error


def load_dense(source: str, directory: Path, dtype: str = STORED) -> Any:
    """The model of a checkpoint, of the architecture that it names, with its head.

    Raises:
        CheckpointError: it is corrupt, or transformers does not know the architecture.
        ConversionError: its weights are quantised, or its FFNs converted already.
    """
    config_json = read_config(directory)
    method = (config_json.get("quantization_config") or {}).get("quant_method")
    if method == "fastffn":
        raise ConversionError(
            f"The FFNs of {source} are not dense. Make them so with `fastffn merge {source} DIRECTORY`, if their kind "
            "can be merged."
        )
    if method:
        raise ConversionError(f"{source} is quantised ({method}); name the checkpoint that it was made from.")
    architecture = model_class_of(config_json, source)
    _log.info("loading %s (%s)", source, architecture.__name__)
    model, info = load_model(architecture, source, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers, and only says so.
        raise CheckpointError(
            f"The weights in {source} are not those of a {architecture.__name__}: {len(missing)} tensors are missing "
            f"(the first: {missing[0]})."
        )
    return model
