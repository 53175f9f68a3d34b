"""Modules made from a dense FFN and tokens that it meets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastffn.errors import ConfigError, KindError
from fastffn.nn.base import FFN
from fastffn.nn.dense import DenseFFN
from fastffn.registry import kind_of

F = TypeVar("F", bound=FFN[Any])

# A normalised token is a few times as long as others at most.
LONGEST = 10.0


def on_cpu(dense: DenseFFN, inputs: torch.Tensor) -> tuple[DenseFFN, torch.Tensor]:
    """Copies of `dense` and of tokens `[S, D]` in float32 on the CPU: a start is then the same everywhere."""
    return copy.deepcopy(dense).to("cpu", torch.float32).eval(), inputs.detach().to("cpu", torch.float32)


def without_outliers(inputs: torch.Tensor) -> torch.Tensor:
    """Tokens `[S, D]`, those over `LONGEST` times the median length made that long: no fit is to serve these alone."""
    length = inputs.norm(dim=1, keepdim=True)
    limit = LONGEST * length.median()
    return torch.where(length > limit, inputs * (limit / length), inputs)


def start_module(
    module: type[F],
    config: Any,
    start: Callable[[F, DenseFFN, torch.Tensor], None],
    dense: DenseFFN,
    inputs: torch.Tensor | None,
) -> F:
    """A module on the device and in the dtype of `dense`, started in float32 on the CPU: the same everywhere.

    Args:
        module: the class to make.
        config: of a kind with a `shared` part, fitted to `dense`.
        start: sets the weights of a module, from a dense FFN and tokens `[S, D]`.
        dense: the FFN to approximate.
        inputs: tokens that it meets.

    The state of torch's random numbers stays as it is.

    Raises:
        KindError: there are no inputs.
        ConfigError: the shared part is wider than `dense`.
        ShapeError: the inputs are not as wide as those of `dense`.
        DtypeError: they are not floating-point.
    """
    if inputs is None or not len(inputs):
        raise KindError(
            f"The kind '{kind_of(config).name}' takes its start from tokens that the dense FFN meets, and got none: "
            "give some text, fastffn.convert(model, config, calibration=batches) or "
            "`fastffn convert ... --calibration TEXT`."
        )
    if config.shared > dense.config.total_width:
        raise ConfigError(f"shared is {config.shared}; the dense FFN has only {dense.config.total_width} neurons.")
    dense.check_input(inputs)
    # A new module draws numbers: always the same ones, and those that the caller draws next stay what they were.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        ffn = module(config).eval()
        plain, rows = on_cpu(dense, inputs)
        start(ffn, plain, without_outliers(rows))
    like = next(dense.parameters())
    return ffn.to(like.device, like.dtype).train(dense.training)
