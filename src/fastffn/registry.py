"""FFN kinds by name: `@register_ffn("name", Config)` on a module makes it known to the whole library.

Commands, conversion, contract tests and the docs table iterate this registry, so a new kind is one file in `nn/`
and one line in `nn/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fastffn.errors import KindError, did_you_mean

if TYPE_CHECKING:
    from fastffn.nn.base import FFN, FFNConfig

T = TypeVar("T")


class Kind(NamedTuple):
    """One kind of FFN: its name, its configuration class and its module class."""

    name: str
    config: type[FFNConfig]
    module: type[FFN[Any]]


_KINDS: dict[str, Kind] = {}


def register_ffn(name: str, config: type[FFNConfig]) -> Callable[[type[T]], type[T]]:
    """Class decorator that registers an FFN module under `name` with its configuration class."""

    def register(module: type[T]) -> type[T]:
        if name in _KINDS:
            raise KindError(f"The FFN kind '{name}' is registered twice; choose another name.")
        _KINDS[name] = Kind(name, config, module)  # type: ignore[arg-type]
        return module

    return register


def kinds() -> dict[str, Kind]:
    """All registered kinds, by name, in the order of their registration."""
    import fastffn.nn  # noqa: F401  (registers them)

    return dict(_KINDS)


def get_kind(name: str) -> Kind:
    """The kind called `name`.

    Raises:
        KindError: no kind has that name.
    """
    known = kinds()
    if name not in known:
        raise KindError(f"Unknown FFN kind '{name}'; known are {', '.join(known)}.{did_you_mean(name, known)}")
    return known[name]


def kind_of(config: FFNConfig) -> Kind:
    """The kind that a configuration belongs to.

    Raises:
        KindError: the configuration's class belongs to no registered kind.
    """
    for kind in kinds().values():
        if type(config) is kind.config:
            return kind
    raise KindError(f"{type(config).__name__} is not the configuration of a registered FFN kind.")
