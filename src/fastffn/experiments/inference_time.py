"""Inference time of FFNs side by side: gated, alternating, beside the dense baseline eager and compiled."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastffn.measure.gate import gate
from fastffn.measure.machine import describe_machine
from fastffn.measure.timer import alternate
from fastffn.nn import FFN, FFNConfig, build
from fastffn.ops.dispatch import use_backend

# Rounds of calls for one image, and for many.
ROUNDS = {"one": 300, "many": 30}
# Outputs in float32 and in float64 that differ by more come from two leaves, or two experts: a score is within
# rounding of zero there.
OTHER_PATH = 1e-3


@torch.no_grad()
def time_inference(configs: Mapping[str, FFNConfig], x: torch.Tensor, *, baseline: str) -> dict[str, Any]:
    """Times evaluation without gradients of fresh FFNs, for one token and for all.

    Args:
        configs: the FFNs by name, `d_model` known.
        x: `[T, D]`, real inputs.
        baseline: name of the dense one that is also compiled.

    Returns:
        `batches`: for each batch its size and the timings; `baselines`: names of the dense baseline, eager and
        compiled; `machine`.

    Raises:
        MeasurementError: an FFN does not compute what its reference computes.
    """
    torch.manual_seed(0)
    ffns: dict[str, FFN[Any]] = {name: build(config).eval() for name, config in configs.items()}
    for name, ffn in ffns.items():
        check(name, ffn, x)
    compiled: Any = torch.compile(copy.deepcopy(ffns[baseline]))
    calls: dict[str, Any] = {**ffns, f"{baseline}-compiled": compiled}
    batches = []
    for rows, rounds, block in ((x[:1], ROUNDS["one"], 10), (x, ROUNDS["many"], 2)):
        # A length of its own, or the compiler would make one program for all lengths.
        torch._dynamo.reset()
        timings = alternate({n: _call(call, rows) for n, call in calls.items()}, rounds=rounds, block=block, warmup=2)
        seconds = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        batches.append({"images": len(rows), "seconds": seconds})
    names = [baseline, f"{baseline}-compiled"]
    return {"batches": batches, "baselines": names, "machine": describe_machine()}


def _call(ffn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: ffn(x)


@torch.no_grad()
def check(name: str, ffn: FFN[Any], x: torch.Tensor) -> None:
    """The gate: what runs, `[T, D]` through `ffn`, against the reference in float32 and in float64.

    Raises:
        MeasurementError: it is not the same.
    """
    result = ffn(x)
    with use_backend("reference"):
        same_dtype, exact = ffn(x), copy.deepcopy(ffn).double()(x.double())
    scale = exact.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    same_path = (same_dtype.double() - exact).abs().amax(1) <= OTHER_PATH * scale
    # The floor: sums over D in another order.
    gate(name, result[same_path], same_dtype[same_path], exact[same_path], floor=1e-5)
