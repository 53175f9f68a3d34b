"""`benchmarks/gpu.py` at toy size on a CPU: every part runs, a second run goes on, and the gate can fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from fastffn.bench.layer import LayerCase, run
from fastffn.errors import MeasurementError
from fastffn.measure.limits import Limits
from fastffn.measure.timer import alternate
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
    monkeypatch.setattr(run, "_timed", lambda case, calls, *_: alternate(calls, rounds=1, warmup=0))
    # A CPU as an accelerator: what is measured on one only runs here too.
    monkeypatch.setattr(LayerCase, "accelerated", True)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
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


PARTS = ["check-bf16", "kernels-3-8", "layer-8-3-bf16-3", "models-training", "models-decoding", "profile"]


@pytest.fixture
def quick(gpu, monkeypatch):
    """The script with parts that do nothing; their names, as they run."""
    ran = []

    def parts_of(plan):
        return {name: lambda name=name: ran.append(name) or {"failures": []} for name in PARTS}

    monkeypatch.setattr(gpu, "parts_of", parts_of)
    return ran


@pytest.mark.slow
def test_dry_run(gpu, monkeypatch, tmp_path: Path, capsys) -> None:
    call(gpu, monkeypatch, tmp_path, "--list")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == PARTS
    call(gpu, monkeypatch, tmp_path)
    assert "no plots: matplotlib, tabulate not installed" in capsys.readouterr().out
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "toy").iterdir()}
    assert set(results) == set(PARTS)
    assert all(result["dry_run"] and result["machine"]["versions"]["torch"] for result in results.values())
    checked = [row for row in results["check-bf16"]["rows"] if "design" in row]
    assert {row["design"] for row in checked} == {"path", "levels"} and {row["bias"] for row in checked} == {
        True,
        False,
    }
    assert all(row["tokens compared"] > 0 for row in checked) and results["check-bf16"]["status"] == "passed"
    row = results["kernels-3-8"]["rows"][0]
    assert {"dense 15", "dense 16 and backward", "path", "levels and backward"} <= set(row["seconds"])
    assert row["predicted"]["dense"] > 0 and len(row["backends"]) == 2
    tree = results["layer-8-3-bf16-3"]["tree"]["rows"]
    assert {row["role"] for row in tree} == {"ffn", "peer", "dense"}
    assert {row["width"] for row in tree if row.get("stands_for") == "total"} == {15, 16}
    own = {(row["name"], row["passes"]): row["chosen"] for row in tree if row["role"] == "ffn"}
    assert own["neuron_tree, triton", "forward"] == {"neuron_tree, forward": "triton"}
    assert own["neuron_tree", "forward + backward"].keys() == {"neuron_tree, forward", "neuron_tree, backward"}
    assert set(results["models-decoding"]["ratio"]) == {"dense", "low_rank", "neuron_tree", "moe", "no FFN"}
    assert [one["passes"] for one in results["profile"]["profiles"][:2]] == ["forward", "forward + backward"]
    assert results["profile"]["profiles"][2]["gap"] > 0


def test_what_is_done_is_not_done_again(gpu, quick, monkeypatch, tmp_path: Path) -> None:
    call(gpu, monkeypatch, tmp_path)
    assert quick == PARTS
    call(gpu, monkeypatch, tmp_path)
    assert quick == PARTS
    call(gpu, monkeypatch, tmp_path, "--only", "models")
    assert quick == [*PARTS, "models-training", "models-decoding"]
    monkeypatch.setattr(gpu, "kernels_hash", lambda: "other kernels")
    call(gpu, monkeypatch, tmp_path, "--only", "check-bf16")
    call(gpu, monkeypatch, tmp_path)
    assert quick == [*PARTS, "models-training", "models-decoding", *PARTS]


def test_a_dry_run_is_no_result(gpu, quick, monkeypatch, tmp_path: Path) -> None:
    call(gpu, monkeypatch, tmp_path)
    path = tmp_path / "toy" / "check-bf16.json"
    mark = {"dry_run": True, "kernels": gpu.kernels_hash()}
    assert gpu.done(path, mark) and not gpu.done(path, mark | {"dry_run": False})


def test_nothing_is_begun_when_time_is_over(gpu, quick, monkeypatch, tmp_path: Path, capsys) -> None:
    call(gpu, monkeypatch, tmp_path, "--minutes", "0")
    assert quick == [] and "0 minutes are over before check-bf16" in capsys.readouterr().out


def test_an_error_in_one_part_leaves_the_others(gpu, quick, monkeypatch, tmp_path: Path) -> None:
    right = gpu.parts_of(None)

    def broken():
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(gpu, "parts_of", lambda plan: right | {"kernels-3-8": broken})
    with pytest.raises(SystemExit, match="kernels-3-8"):
        call(gpu, monkeypatch, tmp_path)
    assert quick == [name for name in PARTS if name != "kernels-3-8"]
    assert not (tmp_path / "toy" / "kernels-3-8.json").exists()
    assert "too much" in (tmp_path / "toy" / "kernels-3-8.error.txt").read_text()
    monkeypatch.setattr(gpu, "parts_of", lambda plan: right)
    call(gpu, monkeypatch, tmp_path)
    assert not (tmp_path / "toy" / "kernels-3-8.error.txt").exists()


def test_a_check_that_fails_stops_the_timing(gpu, quick, monkeypatch, tmp_path: Path, capsys) -> None:
    check = sys.modules["gpu_check"]
    asked = []

    def wrong(*given):
        asked.append(given)
        raise MeasurementError("y: wrong")

    monkeypatch.setattr(check, "check_tree", wrong)
    monkeypatch.setattr(check, "check_grouped", lambda *given: {})
    right = gpu.parts_of(None)
    plan = gpu.toy_plan(torch.device("cpu"))
    failing = {"check-bf16": lambda: check.check_part(plan, "bf16")}
    monkeypatch.setattr(gpu, "parts_of", lambda plan: right | failing)
    with pytest.raises(SystemExit, match=r"failed or not timed: check-bf16$"):
        call(gpu, monkeypatch, tmp_path)
    found = json.loads((tmp_path / "toy" / "check-bf16.json").read_text())
    assert quick == [] and found["status"] == "failed" and len(found["failures"]) == len(asked) == 8
    assert "y: wrong" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="failed or not timed: profile"):
        call(gpu, monkeypatch, tmp_path, "--only", "profile")
    assert quick == []


def test_what_is_wrong_is_not_timed(gpu, monkeypatch) -> None:
    check = sys.modules["gpu_check"]
    plan = gpu.toy_plan(torch.device("cpu"))
    right = check.backend("triton")

    class Wrong:
        def __init__(self, place: int) -> None:
            self.place = place

        def forward(self, *arguments, keep, **named):
            found = list(right.forward(*arguments, keep=keep, **named))
            if self.place < 3:
                found[self.place] = found[self.place] + 1
            return [found[0] + 1, *found[1:]] if self.place == 7 and not keep else found

        def backward(self, *arguments, **named):
            found = list(right.backward(*arguments, **named))
            if 3 <= self.place < 7:
                found[self.place - 3] = found[self.place - 3] + 1
            return found

    case = check.draw_tree(*plan.check[0], torch.float32, plan.device)
    assert check.check_tree(case, "gelu", False)["tokens compared"] > 0
    wrongs = ((0, "y"), (7, "nothing is kept"), (4, "gradient of w_in"))
    for place, words in wrongs:
        monkeypatch.setattr(check, "backend", lambda name, place=place: Wrong(place))
        with pytest.raises(MeasurementError, match=words):
            check.check_tree(case, "gelu", False)

    class Astray(Wrong):
        def forward(self, *arguments, keep, **named):
            found = list(right.forward(*arguments, keep=keep, **named))
            return [found[0], found[1], found[2] + 1] if keep else found

    monkeypatch.setattr(check, "backend", lambda name: Astray(9))
    with pytest.raises(MeasurementError, match="other way"):
        check.check_tree(case, "gelu", False)
    monkeypatch.setattr(check, "backend", lambda name: right)
    x, w_in, b_in, w_out = case
    with pytest.raises(MeasurementError, match="no token was compared"):
        check.check_tree((x, 0 * w_in, 0 * b_in, w_out), "gelu", False)


def test_most_tokens_are_compared(gpu) -> None:
    check = sys.modules["gpu_check"]
    case = check.draw_tree(20, 4, 1, 8, 4, torch.bfloat16, torch.device("cpu"))
    assert check.check_tree(case, "gelu", False)["tokens compared"] > 16
