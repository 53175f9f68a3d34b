"""Peak memory of a call: bytes of tensors that are alive at the worst moment."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run()` holds at once, beyond what is allocated when it starts.

    On an accelerator its allocator is asked. A CPU has no such record: there the storages that operators return are
    added up while they live; scratch space inside an operator does not show.
    """
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        torch.accelerator.synchronize()
        return int(torch.accelerator.max_memory_allocated() - before)
    with _LiveStorages() as live:
        run()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages made inside it for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # An operator in place or a view returns memory that was there before.
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
