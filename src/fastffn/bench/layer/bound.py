"""How fast the FFN could be: what it must multiply, read, write and be given, at the best that the machine does.

    seconds >= max(multiply-adds / rate, bytes read / bandwidth, bytes written / bandwidth) + page faults

Layers that run again and again may find their weights in a cache: they are read at the bandwidth of a working set of
the size of all of them. Where caches are emptied before each call, weights come from memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastffn
from fastffn.bench.layer.case import LayerCase
from fastffn.measure.flops import layer_flops
from fastffn.measure.limits import BEYOND_CACHES, Limits, fresh_seconds
from fastffn.nn import FFNConfig


@dataclass(frozen=True)
class Bound:
    """Seconds that no implementation on this machine goes below, and what they are made of.

    Attributes:
        products, reads, writes, faults: seconds of each.
        multiply_adds: of all layers; weight_bytes: those of distinct weights that are read, of all layers.
    """

    products: float
    reads: float
    writes: float
    faults: float
    multiply_adds: float
    weight_bytes: int

    @property
    def seconds(self) -> float:
        """All together: arithmetic and memory may overlap; waiting for a fresh page cannot."""
        return max(self.products, self.reads, self.writes) + self.faults


def multiply_adds(config: FFNConfig, tokens: int, passes: str) -> float:
    """Those of the matrix products of one layer, neurons that are not visited left out."""
    with torch.device("meta"):
        ffn = fastffn.build(config)
    assert ffn.config.d_model
    both = passes != "forward"
    return layer_flops(ffn.train(both), tokens, ffn.config.d_model, backward=both) / 2


def visited_bytes(layers: Sequence[Any], x: torch.Tensor, itemsize: int) -> int:
    """Bytes of the weights that the tokens `[T, D]` meet: those that get a gradient; all of them in FFNs for inference.

    A row that only decides has none, and is not counted: the bound stays one.
    """
    total = 0
    for layer in layers:
        if not layer.config.TRAINS:
            total += sum(buffer.nbytes for buffer in layer.buffers())
            continue
        probe = copy.deepcopy(layer).float()
        y = probe(x.float())
        y.backward(torch.randn_like(y))
        for parameter in probe.parameters():
            if parameter.grad is not None:
                total += int(torch.count_nonzero(parameter.grad)) * itemsize
    return total


def bound(
    case: LayerCase, layers: Sequence[Any], x: torch.Tensor, passes: str, limits: Limits, *, fresh: bool
) -> Bound:
    """The bound of one call of all layers, in the mode that they are in.

    Args:
        case: the measurement.
        layers: the FFNs.
        x: `[T, D]`, the tokens: they decide which weights are met.
        passes: `forward` or `forward + backward`.
        limits: of the machine.
        fresh: whether outputs come in fresh memory.
    """
    both, itemsize = passes != "forward", case.torch_dtype.itemsize
    config = layers[0].config
    number = len(layers)
    products = number * multiply_adds(case.config, len(x), passes)
    weights = visited_bytes(layers, x, itemsize)
    x_bytes, y_bytes = len(x) * config.d_model * itemsize, len(x) * config.d_out * itemsize
    # The gradients of all weights are written, whoever was visited.
    gradients = [p.numel() * itemsize for layer in layers for p in layer.parameters()] if both else []
    if not case.cold:
        reads = ((1 + both) * weights + x_bytes) / limits.read(weights + x_bytes)
    else:
        # The backward pass may find in a cache what the forward pass has read.
        reads = (weights + x_bytes) / limits.read(BEYOND_CACHES) + both * weights / limits.read(weights)
    writes = number * y_bytes / limits.write(y_bytes)
    device = torch.device(case.device)
    faults = 0.0
    if both:
        writes += (sum(gradients) + x_bytes) / limits.write(sum(gradients) + x_bytes)
        faults = fresh_seconds([x_bytes, *gradients], device)
    if fresh:
        faults += number * fresh_seconds([y_bytes], device)
    return Bound(products / limits.multiply_adds, reads, writes, faults, products, weights)
