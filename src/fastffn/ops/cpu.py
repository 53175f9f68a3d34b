"""The compiled module `fastffn._cpu`: whether it is there, which instruction set it uses, and the numbers it knows
dtypes and activations by.

Its kernels take addresses, sizes and a number of threads; whoever calls them has checked everything.
"""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fastffn.errors import BackendError, did_you_mean
from fastffn.ops.activations import plain_name
from fastffn.settings import cpu_isa

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# As csrc/activations.hpp numbers them.
_NUMBERS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh", "sigmoid", "linear")


class Compiled(NamedTuple):
    """The module, and the position of the instruction set in use among those that this machine runs."""

    module: Any
    isa: int


@lru_cache
def _load() -> tuple[Any, str | None]:
    """The module, or None and why it is missing."""
    try:
        return importlib.import_module("fastffn._cpu"), None
    except ImportError as error:
        return None, f"the compiled module fastffn._cpu cannot be loaded ({error})"


@lru_cache
def _missing() -> str | None:
    """Why the compiled kernels cannot run here, None if they can; the first to ask on a CPU is warned."""
    _, reason = _load()
    if reason is not None:
        warnings.warn(
            f"fastffn runs without its compiled kernels: {reason}. Layers run on plain torch operators, several times "
            "slower. To build it, install a C++ compiler and install fastffn again; `fastffn info` shows the result.",
            stacklevel=2,
        )
    return reason


def refuses(device: str, dtype: torch.dtype, tokens: int) -> str | None:
    """Why no compiled kernel can run a call, None if one can."""
    if device != "cpu":
        return f"runs on a CPU, not on {device}"
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if tokens >= 2**31:
        return "takes fewer than 2**31 tokens"
    return _missing()


def instruction_sets() -> list[str]:
    """Those that this machine runs, the fastest first; empty without the compiled module."""
    module, _ = _load()
    return [] if module is None else list(module.instruction_sets())


@lru_cache
def compiled() -> Compiled:
    """What to call. FASTFFN_CPU_ISA is read at the first call.

    Raises:
        BackendError: the module is missing, or FASTFFN_CPU_ISA names an instruction set that this machine lacks.
    """
    module, reason = _load()
    if module is None:
        raise BackendError(f"Backend 'cpu' cannot run: {reason}.")
    wanted, names = cpu_isa(), instruction_sets()
    if wanted and wanted not in names:
        raise BackendError(
            f"FASTFFN_CPU_ISA is '{wanted}'; this machine runs {', '.join(names)}.{did_you_mean(wanted, names)}"
        )
    return Compiled(module, names.index(wanted) if wanted else 0)


@lru_cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, which torch's matrix products use."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return asked is not None and bool(asked())


@lru_cache
def multiplies_tiles() -> bool:
    """Whether this processor multiplies whole tiles of bfloat16 (AMX), as torch's matrix products do where it can."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


@lru_cache
def activation_number(name: str) -> int:
    """The number of an activation that `ACTIVATIONS` names."""
    return _NUMBERS.index(plain_name(name))


def prefer_large_pages(tensor: torch.Tensor) -> None:
    """Asks for large pages under fresh memory that is about to be written, as the kernels do for what they return."""
    module, _ = _load()
    if module is not None:
        module.prefer_large_pages(tensor.data_ptr(), tensor.nbytes)


def address(tensor: torch.Tensor | None) -> int:
    """Where the numbers of a tensor begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[T, D]` with the numbers of each row side by side; rows may lie apart."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
