"""Peak memory of a call: bytes that PyTorch's allocators hold at the worst moment."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run()` holds at once, beyond what is allocated when it starts.

    On an accelerator its allocator is asked; on a CPU the profiler's record of every allocation is summed up.
    """
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        torch.accelerator.synchronize()
        return int(torch.accelerator.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    held = peak = 0
    events = profile.events() or []
    for event in sorted((e for e in events if e.name == "[memory]"), key=lambda e: e.time_range.start):
        held += event.cpu_memory_usage
        peak = max(peak, held)
    return peak
