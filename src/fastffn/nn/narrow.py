"""The `narrow` kind: a dense FFN most of whose neurons sleep. Merging wakes them; the function stays the same.

A first stage that is cheap because the FFN is small: every neuron that is awake reads and writes all of the residual
stream, which factors of low rank do not, and one awake is next to no FFN at all. Neurons asleep keep the weights into
them that they started with. Once awake they contribute nothing until the weights out of them, zero, have learnt; for
that they respond more: the weights into them grow to twice the size of the others', and biases with them
(docs/two-stage.md: what it is worth).

With `drop` nobody sleeps: the other neurons are gone (structured pruning), and what is left is a smaller dense FFN.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastffn.errors import ConfigError
from fastffn.nn.base import MergedTensor
from fastffn.nn.dense import DenseConfig, DenseFFN, LinearMapFFN
from fastffn.nn.start.least_squares import refit, refit_with_bias
from fastffn.nn.start.neurons import by_use, contributions
from fastffn.nn.start.shown import on_cpu
from fastffn.registry import register_ffn

if TYPE_CHECKING:
    from typing_extensions import Self

# Left as they start, neurons that wake late do not grow in time. Of 0.15 (as they start), 1, 2 and 4, 2 was the best:
# the more they say, the faster the weights out of them make a difference.
WOKEN = 2.0


@dataclass(frozen=True, kw_only=True)
class NarrowConfig(DenseConfig):
    """Configuration of the `narrow` kind; see `DenseConfig` for the other fields.

    Args:
        width: neurons that are awake; None means H / 4.
        drop: whether the other neurons are dropped for good, to infer with fewer, instead of kept to wake up.
    """

    width: int | None = None
    drop: bool = False

    def resolved(self) -> Self:
        """See `FFNConfig.resolved`; also checks the width."""
        config = super().resolved()
        assert config.d_hidden
        width = config.width if config.width is not None else max(1, config.d_hidden // 4)
        if not isinstance(width, int) or not 1 <= width < config.d_hidden:
            raise ConfigError(
                f"width is {width!r}; it must be a whole number of at least 1 and below d_hidden ({config.d_hidden}), "
                "or nothing sleeps."
            )
        return dataclasses.replace(config, width=width)

    @classmethod
    def sizes_for(cls, dense: DenseConfig) -> list[Self]:
        """See `FFNConfig.sizes_for`: parts of the neurons, for good."""
        width = dense.total_width
        return [cls(width=max(1, eighths * width // 8), drop=True) for eighths in (2, 3, 4, 5, 6) if width > 1]

    def check_pretraining(self) -> None:
        """See `FFNConfig.check_pretraining`: neurons that are dropped, all of their weights zero, never learn."""
        if self.drop:
            raise ConfigError(
                "drop leaves neurons out for good, to infer with fewer: after merging they would never learn. "
                "Leave it out (--no-drop), or train a smaller model: --ffn dense --d-hidden N."
            )

    @property
    def active_width(self) -> int:
        """See `FFNConfig.active_width`."""
        assert self.width is not None
        return self.width

    def linear_maps(self) -> dict[str, tuple[int, int]]:
        """See `DenseConfig.linear_maps`; those of the neurons awake."""
        config = self.resolved()
        assert config.width and config.d_model and config.d_out
        maps = super().linear_maps()
        return {n: (config.width, config.d_out) if n == "down" else (config.d_model, config.width) for n in maps}


@register_ffn("narrow", NarrowConfig)
class NarrowFFN(LinearMapFFN[NarrowConfig]):
    """A dense FFN of which a few neurons are awake: `y = down(act(up(x)))` over those alone.

    Shapes:
        x: `[..., D]`; returns `[..., O]` in the dtype of the parameters.
        up.weight, gate.weight: `[W, D]`; up.bias, gate.bias: `[W]`; down.weight: `[O, W]`; down.bias: `[O]`, W the
        neurons awake; without `drop` also asleep.up.weight, asleep.gate.weight: `[H - W, D]`; asleep.up.bias,
        asleep.gate.bias: `[H - W]` (buffers: not trained).

    Raises:
        ShapeError: the last axis of `x` is not D.
    Cost: `W (D + O)` multiply-adds a token, gated `W (2 D + O)`; the dense FFN has H in the place of W.
    """

    def __init__(self, config: NarrowConfig) -> None:
        super().__init__(config)
        assert self.config.width and self.config.d_hidden and self.config.d_model
        self.asleep = nn.Module()
        for name in [] if self.config.drop else self._into():
            linear = nn.Linear(self.config.d_model, self.config.d_hidden - self.config.width, self.config.bias)
            self.asleep.add_module(name, _as_buffers(linear))

    def _into(self) -> list[str]:
        """The maps into the neurons."""
        return [name for name in self.config.linear_maps() if name != "down"]

    def linear_map(self, d_in: int, d_out: int) -> nn.Module:
        """An ordinary linear layer."""
        return nn.Linear(d_in, d_out, bias=self.config.bias)

    @classmethod
    def from_dense(cls, dense: DenseFFN, config: NarrowConfig, inputs: torch.Tensor | None = None) -> Self:
        """The neurons of `dense` that do most, by the norms of their weights; what the others put out is left away.

        With `inputs [S, D]`, those that add most to these tokens' outputs, and the weights out of them made to fit.
        """
        with torch.device("meta"):
            module = cls(config.fitted_to(dense.config))
        width = module.config.width
        assert width is not None
        state = dense.state_dict()
        size = state["down.weight"].float().norm(dim=0)
        for name in module._into():
            size = size * state[f"{name}.weight"].float().norm(dim=1)
        order = size.argsort(descending=True, stable=True)
        fitted = None
        if inputs is not None and len(inputs):
            order, fitted = _fit(dense, inputs, width)
            order = order.to(size.device)
        awake, asleep = order[:width].sort().values, order[width:].sort().values
        tensors = {"down.weight": state["down.weight"][:, awake]}
        for name in module._into():
            for part in ("weight", "bias") if module.config.bias else ("weight",):
                tensors[f"{name}.{part}"] = state[f"{name}.{part}"][awake]
                if not config.drop:
                    tensors[f"asleep.{name}.{part}"] = state[f"{name}.{part}"][asleep]
        if module.config.bias:
            tensors["down.bias"] = state["down.bias"].clone()
        if fitted is not None:
            tensors |= {name: value.to(state[name].device, state[name].dtype) for name, value in fitted.items()}
        module.load_state_dict(tensors, assign=True)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        return module.train(dense.training)

    @classmethod
    def merged_tensors(cls, config: NarrowConfig) -> dict[str, MergedTensor]:
        """The neurons asleep come after those awake, with weights of zero out of them; dropped ones are all zeros.

        Weights into the neurons asleep are enlarged to `WOKEN` times the root mean square of those awake, and biases
        with them: what makes a neuron respond stays what it was.
        """
        into = [name for name in config.linear_maps() if name != "down"]
        parts = ("weight", "bias") if config.bias else ("weight",)
        if config.drop:
            assert config.d_hidden and config.width
            missing = config.d_hidden - config.width
            recipe = {"down.weight": MergedTensor(("down.weight",), partial(_padded, missing, 1))}
            for name in (f"{name}.{part}" for name in into for part in parts):
                recipe[name] = MergedTensor((name,), partial(_padded, missing, 0))
        else:
            recipe = {"down.weight": MergedTensor(("down.weight", "asleep.up.weight"), _silent)}
            for name in into:
                weights = (f"asleep.{name}.weight", f"{name}.weight")
                for part in parts:
                    tensors = (f"asleep.{name}.{part}", f"{name}.{part}")
                    recipe[f"{name}.{part}"] = MergedTensor((*tensors, *weights), _awakened)
        if config.bias:
            recipe["down.bias"] = MergedTensor(("down.bias",))
        return recipe


@torch.no_grad()
def _fit(dense: DenseFFN, inputs: torch.Tensor, width: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All neurons, those that do most for tokens `[S, D]` first; and what `down` of the first `width` should be."""
    plain, rows = on_cpu(dense, inputs)
    hidden = plain.hidden(rows)
    wanted = plain.down(hidden)
    order = by_use(contributions(plain, hidden))
    awake = order[:width].sort().values
    features, start = hidden[:, awake], plain.down.weight[:, awake]
    if not dense.config.bias:
        return order, {"down.weight": refit(features, wanted, start)}
    weight, bias = refit_with_bias(features, wanted, start)
    return order, {"down.weight": weight, "down.bias": bias}


def _padded(missing: int, dim: int, awake: torch.Tensor) -> torch.Tensor:
    """Weights or biases with zeros for so many more neurons."""
    shape = list(awake.shape)
    shape[dim] = missing
    return torch.cat((awake.detach(), awake.new_zeros(shape)), dim)


def _as_buffers(linear: nn.Linear) -> nn.Module:
    holder = nn.Module()
    for name, parameter in linear.named_parameters():
        holder.register_buffer(name, parameter.detach())
    return holder


def _awakened(
    asleep: torch.Tensor, awake: torch.Tensor, asleep_weight: torch.Tensor, awake_weight: torch.Tensor
) -> torch.Tensor:
    """Weights into all neurons, or their biases, those awake first."""
    woken = asleep.detach()
    if not woken.is_meta:
        # On the CPU: several accelerators have no float64.
        size, wanted = (w.detach().cpu().double().square().mean().sqrt() for w in (asleep_weight, awake_weight))
        # Rows of zeros have no direction to be scaled along, and beside such rows no size is right.
        scale = torch.where((size > 0) & (wanted > 0), WOKEN * wanted / size, 1.0).clamp(min=1.0)
        woken = (woken.cpu().double() * scale).to(dtype=awake.dtype, device=awake.device)
    return torch.cat((awake.detach(), woken))


def _silent(down: torch.Tensor, asleep: torch.Tensor) -> torch.Tensor:
    """`[O, W]` to `[O, H]`."""
    return torch.cat((down.detach(), down.new_zeros(len(down), len(asleep))), dim=1)
