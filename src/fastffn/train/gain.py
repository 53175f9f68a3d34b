"""What stage 1 can gain on this machine and at this shape: measured in the run's first seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastffn.convert.fresh import fresh_model, step_bound
from fastffn.measure.step import compare_steps
from fastffn.train.config import PretrainConfig

# Tokens for each parameter of the dense model, docs/two-stage.md: in the longest two-stage runs that were cheaper than
# tuned dense training, and in the next longer ones, that were not.
SAVED, LOST = 11, 23


@dataclass(frozen=True)
class Gain:
    """A dense training step against a factorised one.

    Attributes:
        dense_seconds, factorised_seconds: medians.
        batch: sequences in the measured step; fewer than the run's where its own would take long.
        bound: the ratio that arithmetic allows; free_ffn_bound: that of FFNs that cost nothing.
        saving: part of the whole run's seconds that a factorised stage 1 saves at the measured ratio.
        tokens_per_parameter: what the whole run sees, over the dense model's parameters.
    """

    dense_seconds: float
    factorised_seconds: float
    batch: int
    bound: float
    free_ffn_bound: float
    saving: float
    tokens_per_parameter: float

    @property
    def ratio(self) -> float:
        """How many times faster the factorised step is."""
        return self.dense_seconds / self.factorised_seconds

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Gain:
        """What `to_dict` wrote."""
        return cls(**{name: value for name, value in values.items() if name != "ratio"})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ratio": self.ratio}


def measure_gain(
    config: PretrainConfig,
    vocabulary: int,
    device: torch.device,
    autocast: torch.dtype | None,
    share: float,
    batch: int,
    tokens: int,
) -> Gain:
    """Times both kinds of step.

    Args:
        config: the run.
        vocabulary: number of tokens.
        device: where it will run.
        autocast: dtype of its matrix products, None for float32.
        share: part of the run's steps that are factorised.
        batch: sequences that a device sees at once; fewer where a step would take long.
        tokens: tokens of the whole run.
    """
    shape, ffn = config.shape(vocabulary), config.ffn_config()
    dense_layers = config.dense_layers or 0
    models = {
        "dense": fresh_model(shape).to(device),
        "factorised": fresh_model(shape, ffn, dense_layers=dense_layers).to(device),
    }
    if config.gradient_checkpointing:
        for model in models.values():
            recompute(model)
    used, timings = compare_steps(
        models,
        sequence=config.sequence,
        vocabulary=vocabulary,
        most=batch,
        autocast=autocast,
        rounds=6,
        seconds_a_step=1.0,
        seconds=15.0,
    )
    dense, factorised = timings["dense"].median, timings["factorised"].median
    bound = step_bound(shape, ffn, dense_layers)
    saving = max(0.0, share * (1 - factorised / dense))
    seen = tokens / models["dense"].num_parameters()
    return Gain(dense, factorised, used, bound.speedup, bound.speedup_of_free_ffn, saving, seen)


def advice(tokens_per_parameter: float) -> str:
    """What the measurements of docs/two-stage.md say of a run of that length."""
    if tokens_per_parameter < SAVED:
        measured = (
            f"at fewer than {SAVED}, narrow FFNs at first (--ffn narrow) saved up to a tenth of the FLOPs of tuned "
            "dense training, low rank with the first FFN dense a little more in the shortest runs, and a smaller dense "
            "model (--d-hidden) as much. Without a reason of your own, train dense: --ffn dense, of a size that fits "
            "the budget."
        )
    else:
        measured = (
            f"somewhere between {SAVED} and {LOST} the small gain of first stages and of smaller models was gone. "
            "Without a reason of your own, train dense: --ffn dense."
        )
    seen = f"{tokens_per_parameter:{'.2g' if tokens_per_parameter < 99 else ',.0f'}}"
    return (
        f"Faster steps are not yet time saved. The run sees {seen} tokens for each parameter; in GPTs of a million "
        f"parameters, {measured} More: docs/two-stage.md."
    )


def recompute(model: Any) -> None:
    """Makes a transformers model recompute activations in the backward, under the method's new name or the old."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
