"""Triton: whether it is there, which device it drives, and what every launch of its kernels needs to know.

Nothing here imports Triton before a kernel is asked for: `import fastffn` needs neither the package nor a driver.
With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run in Triton's interpreter on a CPU: for
tests, thousands of times slower. Files called `triton_*.py` hold kernels and import Triton at their top.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every launch says so: Triton 3.10 changes what it does where nothing is said, and 3.9 warns of that.
FUSED = {"enable_fp_fusion": True}


# Older ones are refused. Triton 3.5 (torch 2.9) sorted wrongly, and crashed in a product, in its interpreter; that of
# 3.6 fails with newer NumPy in every loop. Kernels are tested in the interpreters of 3.7 and 3.9.
OLDEST, OLDEST_INTERPRETER = (3, 6), (3, 7)


class Found(NamedTuple):
    """The type of device that kernels run on, or why there is none."""

    device: str | None
    reason: str | None


@lru_cache
def found() -> Found:
    """Looked for once: imports Triton, and asks its driver."""
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError as error:
        return Found(None, f"Triton cannot be imported ({error}); on Linux, pip install triton")
    oldest = OLDEST_INTERPRETER if interpreted() else OLDEST
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < oldest:
        wanted = ".".join(map(str, oldest))
        return Found(None, f"Triton is {triton.__version__}; these kernels want {wanted} or later")
    if interpreted():
        return Found("cpu", None)
    try:
        return Found(triton.runtime.driver.active.get_active_torch_device().type, None)
    except Exception as error:  # each driver has its own
        return Found(None, f"Triton finds no accelerator that it can drive ({str(error).splitlines()[0]})")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: what the environment said when Triton was imported, or will say."""
    language = sys.modules.get("triton.language")
    if language is not None:
        return type(language.zeros).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run a call, None if one can."""
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device == "cpu" and not interpreted():  # without importing Triton for it
        return "runs on an accelerator, not on cpu (with TRITON_INTERPRET=1 there too, very slowly)"
    runs_on, reason = found()
    if reason is not None:
        return reason
    return None if device == runs_on else f"runs on {runs_on}, not on {device}"


def yields() -> str | None:
    """Why the kernels leave a call to others although they could run it, None if they do not."""
    return "is interpreted here (TRITON_INTERPRET=1): only when asked by name" if interpreted() else None


def precision() -> str:
    """How `tl.dot` multiplies float32: as torch's own matrix products may."""
    # `torch.set_float32_matmul_precision` sets this too, and cannot be asked once this was set by itself.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def widens(dtype: torch.dtype) -> bool:
    """Whether products must be made in float32: the interpreter multiplies 16-bit numbers wrongly."""
    return interpreted() and dtype != torch.float32


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device: makes it the tensor's."""
    index = tensor.device.index
    if tensor.device.type == "cpu" or index is None or index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(index)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return max(least, 1 << (number - 1).bit_length())


def ceil_div(number: int, divisor: int) -> int:
    """Rounded up."""
    return -(-number // divisor)
