"""Every FASTFFN_* environment variable, with its one-line meaning."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = {
    "FASTFFN_DATA_DIR": "folder of real texts and tokenizers, for tests, benchmarks and experiments",
    "FASTFFN_CPU_ISA": "instruction set of compiled kernels: avx512_bf16, avx512, avx2, sse2, neon; unset: the fastest",
}


def cpu_isa() -> str:
    """The instruction set that FASTFFN_CPU_ISA names; empty where it is unset."""
    return os.environ.get("FASTFFN_CPU_ISA", "")


def data_dir() -> Path | None:
    """The folder that FASTFFN_DATA_DIR names, or None where it is unset or absent."""
    value = os.environ.get("FASTFFN_DATA_DIR", "")
    path = Path(value)
    return path if value and path.is_dir() else None
