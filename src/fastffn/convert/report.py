"""What a conversion has done to each FFN: its size, its arithmetic and, when asked, its speed on this machine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastffn.convert.files import write_json
from fastffn.measure.flops import layer_flops
from fastffn.measure.timer import alternate
from fastffn.nn import DenseConfig, FFNConfig
from fastffn.registry import kind_of

# Rounds of the timer, and calls in each: a median of some sixty calls.
_ROUNDS, _BLOCK = 15, 5


class Cost(NamedTuple):
    """What one FFN of a configuration costs.

    Attributes:
        parameters: numbers that it holds.
        active: of those, the weights that one token is multiplied with: half of the FLOPs.
        flops: floating-point operations of its matrix products for one token, in inference.
    """

    parameters: int
    active: int
    flops: int


@functools.lru_cache
def cost(config: FFNConfig) -> Cost:
    """The cost of an FFN, counted on the device "meta"."""
    with torch.device("meta"):
        module = kind_of(config).module(config).eval()
    assert module.config.d_model
    flops = layer_flops(module, 1, module.config.d_model, backward=False)
    # An FFN for inference has buffers in the place of parameters, and scales beside.
    named = module.named_parameters() if config.TRAINS else module.named_buffers()
    parameters = sum(tensor.numel() for name, tensor in named if not name.endswith("scale"))
    return Cost(parameters, min(parameters, flops // 2), flops)


@dataclass(frozen=True)
class LayerSpeed:
    """Seconds of one call of an FFN, medians of alternating blocks; the dense FFN is that of plain torch.

    Attributes:
        tokens: in the call.
        before, after: seconds of the dense FFN, and of what replaced it.
    """

    tokens: int
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times as fast it became."""
        return self.before / self.after


@dataclass(frozen=True)
class LayerReport:
    """What happened to one FFN.

    Attributes:
        path: where it is in the model.
        dense: what it was.
        config: what it is now; None if it was left as it was.
        reason: why it was left as it was.
        speeds: as measured by `ConversionReport.measured`.
    """

    path: str
    dense: DenseConfig
    config: FFNConfig | None
    reason: str | None = None
    speeds: tuple[LayerSpeed, ...] = ()

    @property
    def kind(self) -> str:
        """Name of the kind that it is now, `left as it was` if it was not replaced."""
        return "left as it was" if self.config is None else kind_of(self.config).name

    @property
    def before(self) -> Cost:
        """What it cost."""
        return cost(self.dense)

    @property
    def after(self) -> Cost:
        """What it costs now."""
        return cost(self.config or self.dense)

    @property
    def parameters_before(self) -> int:
        """Number of its parameters before."""
        return self.before.parameters

    @property
    def parameters_after(self) -> int:
        """Number of its parameters now."""
        return self.after.parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = {"path": self.path, "kind": self.kind}
        if self.reason:
            values["reason"] = self.reason
        if self.config is not None:
            values["config"] = self.config.to_dict()
        values |= _named(self.before, self.after)
        if self.speeds:
            values["speeds"] = [dataclasses.asdict(speed) | {"ratio": speed.ratio} for speed in self.speeds]
        return values

    def __str__(self) -> str:
        if self.config is None:
            return f"{self.path}: {self.kind} ({self.reason}), {self.parameters_before:,} parameters"
        speeds = "".join(f"; {speed.tokens:,} tokens {speed.ratio:.2f} x as fast" for speed in self.speeds)
        return f"{self.path}: {self.kind}, {_costs(self.before, self.after)}{speeds}"


@dataclass(frozen=True)
class ConversionReport:
    """What happened to every FFN of a model, in order."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), f"all FFNs: {_costs(*self.totals())}"])

    def totals(self) -> tuple[Cost, Cost]:
        """The cost of all FFNs together, before and after."""
        before, after = ([getattr(layer, when) for layer in self.layers] for when in ("before", "after"))
        return tuple(Cost(*map(sum, zip(*costs, strict=True))) for costs in (before, after))  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"layers": [layer.to_dict() for layer in self.layers], "all": _named(*self.totals())}

    def save(self, directory: Path) -> None:
        """Writes `conversion.json`."""
        write_json(directory / "conversion.json", self.to_dict())

    @torch.no_grad()
    def measured(self, model: nn.Module, tokens: Sequence[int] = (1, 256)) -> ConversionReport:
        """The same report with the speed of each replaced FFN, before and after, on this machine.

        Args:
            model: the model that was converted; where its layers are, and in their dtype, they are timed.
            tokens: how many tokens a call gets; random ones.

        Layers of the same configuration are measured once. The dense FFN has random weights, on which its speed does
        not depend; the one that replaced it has its own.
        """
        known: dict[tuple[object, ...], tuple[LayerSpeed, ...]] = {}
        layers = []
        for layer in self.layers:
            if layer.config is None:
                layers.append(layer)
                continue
            module = model.get_submodule(layer.path)
            like = _a_float_of(module)
            key = (layer.dense, layer.config, like.dtype, like.device)
            if key not in known:
                known[key] = tuple(measure_speed(layer.dense, module, count) for count in tokens)
            layers.append(dataclasses.replace(layer, speeds=known[key]))
        return ConversionReport(tuple(layers))


@torch.no_grad()
def measure_speed(dense_config: DenseConfig, module: nn.Module, tokens: int) -> LayerSpeed:
    """The speed of an FFN on random tokens `[tokens, D]`, beside a dense one with random weights."""
    like = _a_float_of(module)
    with torch.device(like.device):
        dense = kind_of(dense_config).module(dense_config).to(like.dtype).eval()
        x = torch.randn(tokens, dense.config.d_model).to(like.dtype)
    training = module.training
    module.eval()
    try:
        timings = alternate({"before": lambda: dense(x), "after": lambda: module(x)}, rounds=_ROUNDS, block=_BLOCK)
    finally:
        module.train(training)
    return LayerSpeed(tokens, timings["before"].median, timings["after"].median)


def _a_float_of(module: nn.Module) -> torch.Tensor:
    """A tensor that has the module's dtype and device; FFNs for inference have no parameters."""
    return next(tensor for tensor in module.state_dict().values() if tensor.is_floating_point())


def _named(before: Cost, after: Cost) -> dict[str, int]:
    return {
        f"{name}_{when}": value
        for when, cost in (("before", before), ("after", after))
        for name, value in cost._asdict().items()
    }


def _costs(before: Cost, after: Cost) -> str:
    return (
        f"{before.parameters:,} -> {after.parameters:,} parameters, {before.active:,} -> {after.active:,} active, "
        f"{before.flops:,} -> {after.flops:,} FLOPs a token"
    )
