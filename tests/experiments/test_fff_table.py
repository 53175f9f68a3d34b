"""The FFF paper's table, small: its rows compare what they say, and it goes on after an interruption."""

from __future__ import annotations

import json

import pytest
import torch

from fastffn import LeafTreeConfig, MoEConfig
from fastffn.data.images import read_images
from fastffn.errors import ConfigError, DataError, MeasurementError, OutputError
from fastffn.experiments import fff_table as module
from fastffn.experiments import inference_time
from fastffn.experiments.classify import Recipe
from fastffn.experiments.fff_cells import REPAIRS, TOGETHER, published_rows, repaired_rows
from fastffn.experiments.fff_table import fff_table, report, table
from fastffn.registry import kind_of

SMALL = {"seeds": 2, "width": 8, "leaf_widths": (4, 1), "epochs": 1}


@pytest.fixture(scope="module")
def digits():
    return read_images("digits")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("fff") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference_time, "ROUNDS", {"one": 2, "many": 2})
        # Compiling takes longer than all the rest.
        patch.setattr(torch, "compile", lambda ffn: ffn)
        return output, fff_table(output, **SMALL)


def test_dense_rows_have_the_widths_that_compare(digits) -> None:
    rows = published_rows(digits, Recipe(), width=128, leaf_widths=(8, 4, 2, 1))
    dense = {row.config.d_hidden: row.title for row in rows if row.name.startswith("dense")}
    assert list(dense) == [128, 12, 9, 8, 4, 2, 1]
    assert dense[12] == "dense 12: active width of leaf 8"
    assert dense[8] == "dense 8: inference width of leaf 8, active width of leaf 2, active width of leaf 1"
    for row in rows:
        if isinstance(row.config, LeafTreeConfig):
            assert row.config.leaves * row.config.leaf_width == 128
            assert row.active == row.config.leaf_width + row.config.depth
        elif isinstance(row.config, MoEConfig):
            assert row.config.experts * row.config.expert_width == 128
        assert (row.config.d_model, row.config.d_out, row.config.activation) == (64, 10, "relu")


def test_repairs_keep_the_active_width(digits) -> None:
    rows = repaired_rows(digits, Recipe(epochs=5), width=128, leaf=8)
    assert len({row.name for row in rows}) == len(rows) == len(REPAIRS) + len(TOGETHER) + 7
    for row in rows:
        if isinstance(row.config, LeafTreeConfig):
            assert row.config.depth + row.config.leaf_width + row.config.shared == row.active
            assert row.active == (20 if row.name == "leaf-8-master" else 12)
    by_name = {row.name: row for row in rows}
    repaired, without = by_name["leaf-8-repaired"], by_name["leaf-8-without-balance"]
    assert (repaired.config.balance_weight, without.config.balance_weight) == (0.3, 0.0)
    assert repaired.recipe == without.recipe
    assert repaired.recipe.leaf_losses and repaired.recipe.optimizer == "adamw"
    assert by_name["leaf-8-without-adamw"].recipe.optimizer == "sgd"
    assert by_name["leaf-8-repaired-longer"].recipe.epochs == by_name["dense-12-longer"].recipe.epochs == 15
    assert by_name["leaf-8-with-shared"].config.shared == 4


def test_a_leaf_width_that_does_not_fit(digits) -> None:
    for leaf in (3, 256, 0):
        with pytest.raises(ConfigError, match=f"leaf width {leaf} does not fit width 128"):
            published_rows(digits, Recipe(), width=128, leaf_widths=(leaf,))


def test_everything_is_there(made) -> None:
    output, result = made
    assert json.loads((output / "result.json").read_text()) == result
    assert (output / "table.md").read_text() == report(result)
    digits = result["images"]["digits"]
    rows = digits["rows"]
    assert all(len(row["seeds"]) == 2 for row in rows.values())
    assert rows["leaf-4"]["seeds"][0] != rows["leaf-4"]["seeds"][1]
    assert rows["leaf-4-repaired"]["config"]["balance_weight"] == 0.3
    assert digits["published"] == {}  # published is width 128
    for timed in digits["inference"]["batches"]:
        assert set(timed["seconds"]) == {row for row in rows if "repair" not in row and "with" not in row} - {
            "leaf-4-master",
            "dense-8-longer",
            "dense-5-longer",
        } | {"dense-8-compiled"}
    assert [timed["images"] for timed in digits["inference"]["batches"]] == [1, 360]


def test_the_table(made) -> None:
    _, result = made
    digits = result["images"]["digits"]
    lines = table(digits).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [row["title"] for row in digits["rows"].values()]
    cells = [cell.strip() for cell in lines[0].split("|")]
    assert cells[2:4] == ["8", "2"]
    accuracies = [seed["generalisation"] for seed in digits["rows"]["dense-8"]["seeds"]]
    assert cells[5].startswith(f"{sum(accuracies) / 2:.2f} +- ")


def test_the_same_call_goes_on(made, monkeypatch) -> None:
    output, result = made
    monkeypatch.setattr(module, "train_classifier", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(module, "time_inference", lambda *_, **__: pytest.fail("timed again"))
    again = fff_table(output, **SMALL)
    assert again["images"] == result["images"]
    fewer = fff_table(output, **SMALL | {"seeds": 1}, timing=False)
    assert len(fewer["images"]["digits"]["rows"]["dense-8"]["seeds"]) == 1
    fewer = fff_table(output, **SMALL, repairs=1, timing=False)["images"]["digits"]["rows"]
    assert [len(fewer[name]["seeds"]) for name in ("leaf-4", "leaf-4-repaired")] == [2, 1]
    assert "leaf-4-repaired" not in fff_table(output, **SMALL, repairs=0, timing=False)["images"]["digits"]["rows"]
    (output / "result.json").write_text(json.dumps(result))
    with pytest.raises(OutputError, match="epochs was 1, now 2"):
        fff_table(output, **SMALL | {"epochs": 2})


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"leaf_widths": ()}, {"epochs": 0}, {"repairs": 3}], ids=str)
def test_bad_input_leaves_nothing_behind(changes, tmp_path) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        fff_table(tmp_path / "runs", **SMALL | changes)
    assert not (tmp_path / "runs").exists()


def test_missing_images_are_found_out_first(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("FASTFFN_DATA_DIR", raising=False)
    with pytest.raises(DataError, match="vision/mnist"):
        fff_table(tmp_path / "runs", images=("digits", "mnist"), **SMALL)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("config", [LeafTreeConfig(depth=3, leaf_width=2), MoEConfig(experts=4, active=1)], ids=str)
def test_the_gate_stops_what_is_wrong(config) -> None:
    config = type(config).from_dict(config.to_dict() | {"d_model": 16, "d_out": 10})
    ffn = kind_of(config).module(config).eval()
    x = torch.randn(200, 16)
    inference_time.check("right", ffn, x)
    right = type(ffn).forward

    class Wrong(type(ffn)):
        def forward(self, x):
            from fastffn.ops.dispatch import _asked

            return right(self, x) * (1.001 if _asked.get() is None else 1)

    ffn.__class__ = Wrong
    with pytest.raises(MeasurementError, match="wrong"):
        inference_time.check("wrong", ffn, x)
