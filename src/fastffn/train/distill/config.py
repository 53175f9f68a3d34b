"""Every field of a distillation, its meaning and its default."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastffn.errors import ConfigError


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A distillation: which model learns from which, on which text, how long.

    Args:
        student: directory of a checkpoint with FastFFN kinds; it is not changed.
        teacher: directory of the dense checkpoint that it was converted from.
    """

    student: str
    teacher: str
    # Text
    data: str = _field("", "file, folder, glob, data set name or directory, or python-docs")
    validation: str | None = _field(None, "text to measure on; default: held out from the data")
    validation_fraction: float = _field(0.05, "part of the data that is held out where there is no validation text")
    validation_blocks: int = _field(64, "sequences to measure on at most, spread over the validation text")
    text_column: str = _field("text", "column or key that holds the text, where there are such")
    document_separator: str | None = _field(
        "<|endoftext|>", "line that ends a document in text files; 'blank': blank lines; empty: a file is a document"
    )
    sequence: int = _field(256, "tokens in a sequence; at most so many for encoders")
    # Phases
    layer_steps: int = _field(200, "steps in which each FFN learns its dense one's outputs; 0: none")
    steps: int = _field(1000, "steps in which the whole model learns the teacher's outputs; 0: none")
    trainable: Literal["all", "ffn"] = _field("all", "what the second phase changes: all weights, or the FFNs'")
    temperature: float = _field(1.0, "of both models' token distributions")
    text_weight: float = _field(0.0, "weight of the cross-entropy with the text's own tokens, beside the teacher's")
    # Optimisation
    batch: int = _field(16, "sequences in an optimizer step")
    micro_batch: int | None = _field(None, "sequences on the device at once; default: all of the batch")
    layer_learning_rate: float = _field(1e-3, "peak learning rate of the first phase")
    learning_rate: float = _field(3e-4, "peak learning rate of the second phase")
    warmup_steps: int = _field(30, "steps of linear warm-up in each phase; a cosine to zero follows")
    clip: float = _field(1.0, "largest norm of the gradient; 0: no clipping")
    precision: Literal["auto", "fp32", "bf16"] = _field("auto", "auto: bf16 on an accelerator that has it")
    seed: int = _field(0, "seed of the order of the data")
    # Rhythm
    evaluate_every: int | None = _field(
        None, "steps between validations; default: a twentieth of the phase, 20 at least"
    )
    checkpoint_every: int = _field(200, "steps between checkpoints")
    log_every: int = _field(20, "steps between log lines")

    def __post_init__(self) -> None:
        """Checks what can be checked before anything is read."""
        for name in ("student", "teacher", "data"):
            if not getattr(self, name):
                raise ConfigError(
                    f"{name} is missing; name {'a text with --data' if name == 'data' else 'a directory'}."
                )
        for name in ("batch", "checkpoint_every", "validation_blocks", "log_every", "micro_batch", "evaluate_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be at least 1")
        _require(self.sequence >= 2, "sequence", self.sequence, "must be at least 2")
        for name in ("layer_steps", "steps", "warmup_steps", "clip", "text_weight"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "must not be negative")
        for name in ("temperature", "layer_learning_rate", "learning_rate"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "must be above 0")
        _require(
            0 < self.validation_fraction <= 0.5,
            "validation_fraction",
            self.validation_fraction,
            "must be above 0, at most 0.5",
        )
        for name, known in (("trainable", ("all", "ffn")), ("precision", ("auto", "fp32", "bf16"))):
            _require(getattr(self, name) in known, name, getattr(self, name), f"must be one of {', '.join(known)}")
        if not self.layer_steps and not self.steps:
            raise ConfigError("layer_steps and steps are both 0: nothing would be trained. Give at least one of them.")
        if self.batch % (self.micro_batch or self.batch):
            raise ConfigError(f"batch is {self.batch}, which micro_batch {self.micro_batch} does not divide.")

    def to_flat(self) -> dict[str, Any]:
        """All fields as plain values; a path with a slash at its end is the same path, and the same run."""
        values = dataclasses.asdict(self)
        for name in ("student", "teacher", "data", "validation"):
            if values[name] and len(values[name]) > 1:
                values[name] = values[name].rstrip("/")
        return values


def _require(condition: bool, name: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value}; it {rule}.")
