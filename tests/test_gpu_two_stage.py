"""`benchmarks/gpu_two_stage.py` at toy size on a CPU: every part runs, and a second call goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "benchmarks" / "gpu_two_stage.py"
    spec = importlib.util.spec_from_file_location("gpu_two_stage", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, monkeypatch, folder: Path, *arguments: str) -> None:
    paths = ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    monkeypatch.setattr(sys, "argv", ["gpu_two_stage.py", "toy", "--dry-run", *paths, *arguments])
    monkeypatch.delenv("FASTFFN_DATA_DIR", raising=False)
    script.main()


@pytest.mark.slow
def test_dry_run(script, monkeypatch, text_file, tmp_path, capfd) -> None:
    data = ("--data", str(text_file))
    # Ended in the middle of the experiment: nothing is written of it, and the next call goes on.
    monkeypatch.setattr(script, "experiment", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    call(script, monkeypatch, tmp_path, *data, "--only", "time-to-loss-seed-eager", "--minutes", "0.01")
    assert "The minutes are over at time-to-loss-seed-eager" in capfd.readouterr().out
    assert not (tmp_path / "results").exists()
    monkeypatch.undo()

    call(script, monkeypatch, tmp_path, *data)
    assert "Everything is done." in capfd.readouterr().out
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results" / "toy").iterdir()}
    names = [f"step-seed-{ffn}-eager" for ffn in ("rank-2", "rank-4", "rank-8", "narrow-16", "block-4")]
    assert set(found) == {*names, "time-to-loss-seed-eager"}
    for name in names:
        assert found[name]["dry_run"] and found[name]["ratio"] > 0 and found[name]["bound"] > 0
    screen = found["time-to-loss-seed-eager"]["screen"]
    assert set(screen) == {"dense", *script.RECIPES}

    call(script, monkeypatch, tmp_path, *data)
    assert "done\n" not in capfd.readouterr().out.replace("Everything is done.", "")


def test_an_unknown_part_is_named(script, monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        call(script, monkeypatch, tmp_path, "--data", "nowhere", "--only", "step")
    assert "there is no part 'step'; there are step-seed-rank-2-eager" in capsys.readouterr().err
