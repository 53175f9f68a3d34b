"""Which FFNs of a model are converted, and to what."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from fastffn.convert.match import family_ffns, family_of
from fastffn.errors import ConfigError, ConversionError, did_you_mean
from fastffn.nn import FFNConfig

# Takes the path of an FFN; or one or several patterns, of which one must match the path.
Filter = Callable[[str], bool] | str | Sequence[str]


def select(
    paths: Sequence[str], config: FFNConfig | Mapping[str, FFNConfig | None], filter: Filter | None
) -> dict[str, FFNConfig]:
    """The configuration of every FFN that is to be converted, by path, in the order of `paths`.

    Raises:
        ConversionError: a pattern matches nothing, a path does not exist, or nothing is left to convert.
    """
    takes = as_function(paths, filter)
    if not isinstance(config, FFNConfig):
        for path in config:
            if path not in paths:
                raise ConversionError(
                    f"There is no FFN '{path}' in the model; it has {enumerated(paths)}.{did_you_mean(path, paths)}"
                )
    chosen = {}
    for path in paths:
        own = config if isinstance(config, FFNConfig) else config.get(path)
        if own is not None and takes(path):
            chosen[path] = own
    return chosen


def as_function(paths: Sequence[str], filter: Filter | None) -> Callable[[str], bool]:
    """A filter as a function of a path.

    Raises:
        ConversionError: a pattern matches none of the paths.
    """
    if filter is None:
        return lambda path: True
    if callable(filter):
        return filter
    patterns = [filter] if isinstance(filter, str) else list(filter)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ConversionError(f"No FFN matches the pattern '{pattern}'; the model has {enumerated(paths)}.")
    return lambda path: any(fnmatchcase(path, pattern) for pattern in patterns)


def layer_filter(model: Any, layers: str) -> Callable[[str], bool]:
    """A filter that takes the FFNs of some layers.

    Args:
        model: a model of a known family.
        layers: numbers and ranges of the model's FFNs, counted from 0, both ends included: `0-5,11`.

    Raises:
        ConfigError: that is not what `layers` holds, or the model has no such layer.
    """
    paths = [path for path, _ in family_ffns(model, family_of(model.config))]
    numbers: set[int] = set()
    for part in layers.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first:
            raise ConfigError(f"layers is '{layers}'; it must be numbers and rising ranges, such as 0-5,11.")
        if last >= len(paths):
            raise ConfigError(
                f"layers is '{layers}', but the model has {len(paths)} FFNs: their numbers are 0 to {len(paths) - 1}."
            )
        numbers |= set(range(first, last + 1))
    taken = {paths[number] for number in numbers}
    return lambda path: path in taken


def layers_and_patterns(model: Any, layers: str | None, patterns: Sequence[str]) -> Callable[[str], bool]:
    """A filter that takes the FFNs that `layer_filter` takes and one of the patterns matches, where they are given."""
    paths = [path for path, _ in family_ffns(model, family_of(model.config))]
    by_number = as_function(paths, layer_filter(model, layers) if layers else None)
    by_pattern = as_function(paths, patterns or None)
    return lambda path: by_number(path) and by_pattern(path)


def enumerated(paths: Sequence[str]) -> str:
    """Paths for a message: all of a few, the ends of many."""
    if len(paths) <= 6:
        return ", ".join(paths) or "none"
    return f"{', '.join(paths[:3])}, ..., {paths[-1]} ({len(paths)} in all)"
