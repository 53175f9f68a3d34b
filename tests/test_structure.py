"""The house plan, held by tests: floors, lightness, no device's name, no trace of where it was written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastffn
from fastffn import errors

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fastffn"

# Rooms from the top floor down; those on one floor do not import each other.
FLOORS = [
    {"cli"},
    {"experiments"},
    {"train", "evaluate", "bench"},
    {"convert", "data"},
    {"measure", "nn"},
    {"ops"},
    {"errors", "settings", "registry"},
]
# `fastffn.hf` is only the import that registers `convert.io`; it stands on that floor, `__main__` on that of the
# commands.
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms} | {"hf": 3, "__main__": 0}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules of ours that a file imports, and whether only for type checkers."""
    tree = ast.parse(path.read_text())
    typing_only: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only |= {id(child) for child in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) in typing_only) for name in names if name.startswith("fastffn.")]
    return found


def test_imports_go_down_only() -> None:
    checked = 0
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE).with_suffix("").parts
        room = relative[0]
        if room == "__init__":
            continue
        for name, typing_only in imports(path):
            target = name.split(".")[1]
            # The registry hands out kinds: it names their types, and loads them when asked.
            if typing_only or target == room or (room == "registry" and target == "nn"):
                continue
            assert target in FLOOR_OF, f"{path}: {name} is in no room of the house plan"
            assert FLOOR_OF[target] >= FLOOR_OF[room], f"{path} (floor of {room}) imports upwards: {name}"
            if FLOOR_OF[target] == FLOOR_OF[room] and {target, room} <= set.union(*FLOORS):
                assert room in FLOORS[-1], f"{path}: {room} and {target} are rooms of one floor"
            checked += 1
    assert checked > 50


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} <= set(FLOOR_OF)


def test_import_is_light() -> None:
    code = (
        "import sys, fastffn\n"
        "heavy = {'transformers', 'datasets', 'accelerate', 'tokenizers', 'safetensors', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_layers_work_without_transformers() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'datasets', 'safetensors', 'click'): sys.modules[name] = None\n"
        "import torch, fastffn\n"
        "ffn = fastffn.build('low_rank', d_model=8, rank=2)\n"
        "model = torch.nn.Sequential(ffn)\n"
        "x = torch.randn(3, 8)\n"
        "y = model(x)\n"
        "y.sum().backward()\n"
        "fastffn.merge(model)\n"
        "assert torch.allclose(model(x), y, atol=1e-5)\n"
        "from fastffn.errors import MissingDependencyError\n"
        "try: import fastffn.hf\n"
        "except MissingDependencyError as error: print(error)\n"
        "from fastffn.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'fastffn[train]'" in done.stdout
    assert done.stdout.strip().endswith("2")
    assert "pip install 'fastffn[train]'" in done.stderr


def test_no_device_is_named() -> None:
    named = re.compile(r"""["'](cuda|mps|xpu|npu|hpu)\b""")
    for path in SOURCE.rglob("*.py"):
        assert not named.search(path.read_text()), f"{path} names a device"


def test_errors_are_also_built_ins() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) > 8
    for error in classes:
        assert issubclass(error, errors.FastFFNError)
        if error is not errors.FastFFNError:
            assert any(base.__module__ == "builtins" and base is not Exception for base in error.__mro__[1:4])


def test_versions_agree() -> None:
    import importlib.metadata

    assert importlib.metadata.version("fastffn") == fastffn.__version__
    assert f"## {fastffn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", fastffn.__all__)
def test_public_names_are_documented(name) -> None:
    assert (getattr(fastffn, name).__doc__ or "").strip()
