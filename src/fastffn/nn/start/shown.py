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

    Raises:
        KindError: there are no inputs.
        ConfigError: the shared part is wider than `dense`.
    """
    if inputs is None or not len(inputs):
        raise KindError(
            f"The kind '{kind_of(config).name}' takes its start from tokens that the dense FFN meets, and got none: "
            "give some text, fastffn.convert(model, config, calibration=batches) or "
            "`fastffn convert ... --calibration TEXT`."
        )
    if config.shared > dense.config.total_width:
        raise ConfigError(f"shared is {config.shared}; the dense FFN has only {dense.config.total_width} neurons.")
    with torch.device("cpu"):
        ffn = module(config).eval()
        plain = copy.deepcopy(dense).to("cpu", torch.float32).eval()
        start(ffn, plain, inputs.detach().to("cpu", torch.float32))
    like = next(dense.parameters())
    return ffn.to(like.device, like.dtype).train(dense.training)
