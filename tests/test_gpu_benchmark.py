"""`benchmarks/gpu.py` at toy size on a CPU: every part runs, a second run goes on, and the gate can fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fastffn.bench.layer import run
from fastffn.errors import MeasurementError
from fastffn.measure.limits import Limits
from fastffn.ops import triton

pytestmark = pytest.mark.skipif(triton.found().device is None, reason=str(triton.found().reason))


@pytest.fixture
def gpu(monkeypatch):
    """The script, without libraries that a machine with a GPU may lack, and with limits that are not measured here."""
    for name in ("transformers", "accelerate", "datasets", "safetensors", "matplotlib", "tabulate", "click", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(run, "measure_limits", lambda *_: Limits(1e11, {2**18: 1e11}, {2**18: 1e11}, 3e9))
    # A busy machine must not decide which peers take part.
    monkeypatch.setattr(run, "_not_too_slow", lambda *_: None)
    path = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return module


def call(gpu, monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "toy", "--dry-run", "--results", str(folder), *arguments])
    gpu.main()


@pytest.mark.slow
def test_dry_run(gpu, monkeypatch, tmp_path: Path, capsys) -> None:
    parts = ["check", "kernels", "layer-8-3-fp32", "models", "profile"]
    call(gpu, monkeypatch, tmp_path, "--list")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == parts
    with pytest.raises(SystemExit):
        call(gpu, monkeypatch, tmp_path, "--only", "models")
    assert "run the part 'check' first" in capsys.readouterr().err
    call(gpu, monkeypatch, tmp_path)
    assert "no plots: matplotlib, tabulate not installed" in capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "toy").iterdir()}
    assert set(results) == set(parts)
    assert all(result["dry_run"] and result["machine"]["versions"]["torch"] for result in results.values())
    designs = [row["design"] for row in results["check"]["rows"] if "design" in row]
    assert set(designs) == {"path", "levels"}
    row = results["kernels"]["rows"][0]
    assert {"dense", "path", "levels", "path and backward"} <= set(row["seconds"]) and row["predicted"]["dense"] > 0
    tree = results["layer-8-3-fp32"]["tree"]["rows"]
    assert {row["role"] for row in tree} == {"ffn", "peer", "dense"}
    assert set(results["models"]["decoding"]["ratio"]) == {"dense", "low_rank", "neuron_tree", "moe", "no FFN"}
    assert results["profile"]["gap"] > 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").iterdir()}
    call(gpu, monkeypatch, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").iterdir()} == written


def test_what_is_wrong_is_not_timed(gpu, monkeypatch) -> None:
    plan = gpu.toy_plan(torch.device("cpu"))
    right = gpu.backend("triton")

    class Wrong:
        def __init__(self, place: int) -> None:
            self.place = place

        def forward(self, *arguments, **named):
            found = list(right.forward(*arguments, **named))
            if self.place < 3:
                found[self.place] = found[self.place] + 1
            return found

        def backward(self, *arguments, **named):
            found = list(right.backward(*arguments, **named))
            if self.place >= 3:
                found[self.place - 3] = found[self.place - 3] + 1
            return found

    case = gpu.draw_tree(*plan.check[0], torch.float32, plan.device)
    assert gpu.check_tree(case, "gelu", False)["tokens compared"] > 0
    for place, words in ((0, "y"), (2, "other way"), (4, "gradient of w_in")):
        monkeypatch.setattr(gpu, "backend", lambda name, place=place: Wrong(place))
        with pytest.raises(MeasurementError, match=words):
            gpu.check_tree(case, "gelu", False)
