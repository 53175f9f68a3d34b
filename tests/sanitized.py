"""A pytest plugin for `make sanitize`: the compiled module is the one that FASTFFN_SANITIZED names."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch  # noqa: F401  (its OpenMP is the one to use)

_path = os.environ["FASTFFN_SANITIZED"]
_spec = importlib.util.spec_from_file_location("fastffn._cpu", _path)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["fastffn._cpu"] = _module
_spec.loader.exec_module(_module)
