"""One training step, dense against factorised, with the bound that arithmetic gives."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate

from fastffn.convert.api import merge
from fastffn.convert.fresh import ModelShape, fresh_model, step_bound
from fastffn.measure.gate import gate
from fastffn.measure.machine import describe_machine
from fastffn.measure.memory import peak_bytes
from fastffn.measure.step import compare_steps, random_tokens, training_step
from fastffn.nn import FFNConfig
from fastffn.registry import kind_of

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def bench_step(
    shape: ModelShape,
    ffn: FFNConfig,
    *,
    batch: int,
    rounds: int = 10,
    precision: str = "fp32",
    compiled: bool = False,
    dense_layers: int = 0,
    seconds_a_step: float = 5.0,
) -> dict[str, Any]:
    """Times a training step of a dense GPT-2 and of one with another kind of FFN, in one process, alternating.

    Args:
        shape: of both models.
        ffn: configuration of the other kind; it must merge (that is how its result is checked before it is timed).
        batch: sequences in a step; fewer if a dense step would take more than `seconds_a_step`.
        rounds: timed steps of each.
        precision: fp32, or the dtype of autocast.
        compiled: compile both models.
        dense_layers: first FFNs that are dense in both.
        seconds_a_step: see `batch`.

    Returns:
        Seconds, ratio, bounds, peak memory, machine.

    Raises:
        MeasurementError: the factorised model does not compute what its merged form computes.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    models: dict[str, Any] = {
        "dense": fresh_model(shape).to(device),
        "factorised": fresh_model(shape, ffn, dense_layers=dense_layers).to(device),
    }
    error = _gate(models["factorised"], shape)
    timed: dict[str, Any] = {name: torch.compile(model) if compiled else model for name, model in models.items()}
    autocast = AUTOCAST[precision]
    used, timings = compare_steps(
        timed,
        sequence=shape.sequence,
        vocabulary=shape.vocabulary,
        most=batch,
        autocast=autocast,
        rounds=rounds,
        seconds_a_step=seconds_a_step,
    )
    ids = random_tokens(used, shape.sequence, shape.vocabulary, device)
    memory = {}
    for name, model in timed.items():
        step = training_step(model, ids, autocast)
        step()  # the optimizer's state is there from the first step on; it is not part of the peak
        memory[name] = peak_bytes(step, device)
    bound = step_bound(shape, ffn, dense_layers)
    return {
        "shape": asdict(shape),
        "kind": kind_of(ffn).name,
        "ffn": ffn.to_dict(),
        "dense_layers": dense_layers,
        "batch": used,
        "precision": precision,
        "compiled": compiled,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "ratio": timings["dense"].median / timings["factorised"].median,
        "bound": bound.speedup,
        "free_ffn_bound": bound.speedup_of_free_ffn,
        "gflops": {"dense": bound.dense * used / 1e9, "factorised": bound.factorised * used / 1e9},
        "peak_bytes": memory,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "gate_error": error,
        "machine": describe_machine(),
    }


@torch.no_grad()
def _gate(model: Any, shape: ModelShape) -> float:
    """The factorised model against its merged form; both in float64 give the exact value."""
    ids = random_tokens(1, min(32, shape.sequence), shape.vocabulary, torch.device("cpu"))
    factorised = copy.deepcopy(model).cpu().eval()
    merged = copy.deepcopy(factorised)
    merge(merged)
    result, same_dtype = merged(input_ids=ids).logits, factorised(input_ids=ids).logits
    exact = factorised.double()(input_ids=ids).logits
    # The floor: merging rounds each weight of each layer once more.
    return gate("merged against factorised model", result, same_dtype, exact, floor=1e-6 * shape.layers)


def format_step(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    shape = result["shape"]
    rows = []
    for name, timing in result["seconds"].items():
        rows.append(
            (
                name,
                f"{timing['median']:.4f}",
                f"{timing['low']:.4f} to {timing['high']:.4f}",
                f"{result['gflops'][name] / timing['median']:,.0f}",
                f"{result['peak_bytes'][name] / 1e6:,.0f}",
                f"{result['parameters'][name]:,}",
            )
        )
    headers = ("model", "seconds a step", "quartiles", "GFLOP/s", "peak MB", "parameters")
    table = tabulate(rows, headers=headers, colalign=("left",) + ("right",) * 5, disable_numparse=True)
    ffn = ", ".join(
        [result["kind"]] + [f"{k} {v}" for k, v in result["ffn"].items() if k not in FFNConfig.MODEL_FIELDS]
    )
    return (
        f"{shape['layers']} layers x {shape['d_model']}, sequence {shape['sequence']}, "
        f"vocabulary {shape['vocabulary']}, "
        f"{result['batch']} sequences a step, {result['precision']}"
        f"{', compiled' if result['compiled'] else ''}; {ffn}"
        f"{', first ' + str(dense) + ' FFNs dense' if (dense := result['dense_layers']) else ''}\n\n"
        f"{table}\n\n"
        f"factorised is {result['ratio']:.2f} times faster; arithmetic allows {result['bound']:.2f}, an FFN "
        f"that cost nothing would give {result['free_ffn_bound']:.2f}.\n"
        f"{result['machine']['processor']}, {result['machine']['threads']} threads, accelerator "
        f"{result['machine']['accelerator'] or 'none'}, torch {result['machine']['versions']['torch']}"
    )
