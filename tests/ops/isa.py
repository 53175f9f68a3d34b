"""Another instruction set for the compiled kernels, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastffn.ops import cpu


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """FASTFFN_CPU_ISA is read once; here it is read again, before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTFFN_CPU_ISA", name)
        cpu.compiled.cache_clear()
        try:
            yield
        finally:
            cpu.compiled.cache_clear()
