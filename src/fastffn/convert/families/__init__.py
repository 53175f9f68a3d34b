"""Model families, one file each. A file holds one `FAMILY`; nothing else has to know about it."""

from __future__ import annotations

import importlib
import pkgutil

from fastffn.convert.match import Family


def families() -> list[Family]:
    """Every family in this folder, by file name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
