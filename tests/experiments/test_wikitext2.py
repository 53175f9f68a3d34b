"""The downstream table, small: its rows are what they say they are, and it goes on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math

import pytest

from fastffn.errors import ConfigError
from fastffn.evaluate.perplexity import evaluate_perplexity
from fastffn.experiments import wikitext2 as module
from fastffn.experiments.wikitext2 import ROWS, Tuning, table, wikitext2_table, wikitext_2
from tests.train.test_pretrain import tiny

TUNING = Tuning(steps=6, learning_rate=1e-3, evaluate_every=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "wikitext-2"
    folder.mkdir()
    for name, count in (("train", 400), ("valid", 40), ("test", 40)):
        lines = [f" the machine {n} forgets a {name} river . \n" for n in range(count)]
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress("".join(lines).encode()))
    return folder.parent


@pytest.fixture(scope="module")
def made(data, text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("wikitext-2") / "runs"
    config = tiny(text_file, seed=3, initializer_range=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTFFN_DATA_DIR", str(data))
        return config, output, wikitext2_table(config, output, seeds=2, tuning=TUNING)


def test_rows_are_what_they_say(made, data) -> None:
    _, output, result = made
    assert json.loads((output / "table.json").read_text()) == result
    assert {path.name for path in output.iterdir()} == {"seed-3", "seed-4", "table.md", "table.json"}
    for number, seed in enumerate((3, 4)):
        base = output / f"seed-{seed}"
        stages = json.loads((base / "pretrained" / "results.json").read_text())["stages"]
        starts = {
            "none": None,
            "two-stage": base / "pretrained" / "stage2",
            "dense, same tokens": base / "pretrained" / "dense",
            "dense, same seconds": base / "dense-same-seconds" / "dense",
        }
        for name, start in starts.items():
            run = base / f"tuned-{name.replace(', ', '-').replace(' ', '-')}"
            kept = json.loads((run / "results.json").read_text())
            assert kept["config"]["init_from"] == (start and str(start))
            # Weights of a checkpoint have the spread they have.
            assert kept["config"]["initializer_range"] == (0.05 if start is None else None)
            assert kept["config"]["seed"] == seed
            assert kept["config"]["data"] == str(data / "wikitext-2" / "train.txt.xz")
            assert kept["config"]["validation"] == str(data / "wikitext-2" / "valid.txt.xz")
            assert kept["stages"]["dense"]["steps"] == 6
            score = evaluate_perplexity(run / "dense", str(data / "wikitext-2" / "test.txt.xz"))
            assert result["rows"][name]["loss"][number] == pytest.approx(math.log(score["token_perplexity"]))
        rows = {name: (row["seconds"][number], row["steps"][number]) for name, row in result["rows"].items()}
        assert rows["none"] == (0.0, 0)
        assert rows["two-stage"] == (stages["stage2"]["seconds"], 20)
        assert rows["dense, same tokens"] == (stages["dense"]["seconds"], 20)
        allowed = stages["stage2"]["seconds"] / (stages["dense"]["own_seconds"] / 20)
        assert rows["dense, same seconds"][1] == int(allowed)


def test_the_table(made) -> None:
    _, output, result = made
    text = (output / "table.md").read_text()
    assert table(result) in text
    rows = [line.split("|")[1].strip() for line in table(result).splitlines()[2:]]
    assert rows == list(ROWS.values())
    assert "6.657" in text and "4.392" in text


def test_the_same_call_shows_it_again_without_training(made, data, monkeypatch) -> None:
    config, output, result = made
    monkeypatch.setenv("FASTFFN_DATA_DIR", str(data))
    monkeypatch.setattr(module, "evaluate_perplexity", None)
    monkeypatch.setattr("fastffn.train.pretrain._Run", None)
    again = wikitext2_table(config, output, seeds=2, tuning=TUNING)
    assert again["rows"] == result["rows"]


def test_without_the_folder_it_is_a_data_set_by_name(monkeypatch) -> None:
    monkeypatch.delenv("FASTFFN_DATA_DIR", raising=False)
    assert wikitext_2()["test"] == {"data": "wikitext-2", "split": "test"}


@pytest.mark.parametrize("changes", [{"ffn": "dense", "rank": None}, {"baseline": False}], ids=str)
def test_what_it_needs(text_file, tmp_path, changes) -> None:
    with pytest.raises(ConfigError, match="two-stage run in one schedule with its dense baseline"):
        wikitext2_table(tiny(text_file, **changes), tmp_path / "runs")
    with pytest.raises(ConfigError, match="seeds is 0"):
        wikitext2_table(dataclasses.replace(tiny(text_file)), tmp_path / "runs", seeds=0)
    with pytest.raises(ConfigError, match="predict the next token, not of bert"):
        wikitext2_table(tiny(text_file, architecture="bert"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
