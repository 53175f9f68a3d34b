"""Reading and writing checkpoints tensor by tensor, so that memory is that of the largest tensor.

The safetensors package writes a file only from a whole dictionary of tensors; its format is a length, a JSON
header and the bytes (https://github.com/huggingface/safetensors#format), so writing it in pieces is short.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from fastffn.convert.files import read_json, write_json
from fastffn.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class TensorReader:
    """The tensors of a checkpoint directory, one file or several, each read when it is asked for.

    Raises:
        CheckpointError: the directory holds no safetensors, or one of the files is corrupt or missing.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; name the directory of a checkpoint.")
        if (directory / WEIGHTS).is_file():
            files = [directory / WEIGHTS]
        elif (directory / INDEX).is_file():
            names = read_json(directory / INDEX).get("weight_map", {}).values()
            files = [directory / name for name in dict.fromkeys(names)]
        else:
            raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}; it is no checkpoint to merge.")
        self._file_of: dict[str, Path] = {}
        self._dtype_and_shape: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (not a dict)
                        piece = opened.get_slice(name)
                        self._file_of[name] = file
                        if piece.get_dtype() not in _DTYPES:
                            raise CheckpointError(
                                f"'{name}' in {file} has the dtype {piece.get_dtype()}; known are {', '.join(_DTYPES)}."
                            )
                        self._dtype_and_shape[name] = (_DTYPES[piece.get_dtype()], tuple(piece.get_shape()))
            except FileNotFoundError:
                raise CheckpointError(f"{file} is missing, though {directory / INDEX} names it.") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is corrupt or cut short ({error}).") from error

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of the files."""
        return list(self._file_of)

    def dtype_and_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, without reading it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._dtype_and_shape:
            raise CheckpointError(f"The tensor '{name}' is missing; the checkpoint is not complete.")
        return self._dtype_and_shape[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        self.dtype_and_shape(name)
        # The file is opened for each tensor: what is mapped is let go again.
        with safe_open(self._file_of[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


class PlannedTensor(NamedTuple):
    """A tensor that will be written: its name, dtype and shape now, its values when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_checkpoint(directory: Path, plan: list[PlannedTensor], max_shard_bytes: int) -> None:
    """Writes tensors into `directory` as transformers lays them out: one file, or numbered ones and an index."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(directory / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in plan)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, tensors: list[PlannedTensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide elements first: readers may rely on every tensor being aligned to its own element size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in tensors:
            values = tensor.values()
            if values.dtype != tensor.dtype or tuple(values.shape) != tensor.shape:
                raise CheckpointError(
                    f"'{tensor.name}' should be {tensor.dtype} {list(tensor.shape)} and came out as {values.dtype} "
                    f"{list(values.shape)}; the checkpoint does not fit its config.json."
                )
            file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values  # before the next one is made
