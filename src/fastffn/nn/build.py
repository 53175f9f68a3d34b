"""`fastffn.build`: a configuration, or a kind's name and fields, becomes a module."""

from __future__ import annotations

from typing import Any

from fastffn.errors import ConfigError
from fastffn.nn.base import FFN, FFNConfig
from fastffn.registry import get_kind, kind_of


def build(config: FFNConfig | str, **fields: Any) -> FFN[Any]:
    """Builds the FFN that `config` describes.

    Args:
        config: a configuration such as `LowRankConfig(d_model=768, rank=192)`, or the name of a kind, whose
            `fields` then follow: `build("low_rank", d_model=768, rank=192)`.

    Returns:
        A `torch.nn.Module` that maps `[..., D]` to `[..., O]`.

    Raises:
        KindError: no kind has that name.
        ConfigError: a field is unknown or out of range, or `d_model` is missing.
    """
    if isinstance(config, str):
        config = get_kind(config).config.from_dict(fields)
    elif fields:
        raise ConfigError(f"Fields ({', '.join(fields)}) go into {type(config).__name__}(...), not beside it.")
    return kind_of(config).module(config)
