"""The ladder of trees, small: its runs are what they say, and it goes on after an interruption."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastffn import NeuronTreeConfig, NeuronTreeFFN
from fastffn.errors import ConfigError, OutputError
from fastffn.experiments import tree_ladder as module
from fastffn.experiments.rungs import ACTIVE, ladder
from fastffn.experiments.tree_ladder import report, run_of, table, tree_ladder
from fastffn.experiments.tree_usage import _mirrored, last_nodes
from fastffn.ops.neuron_tree import reference
from fastffn.train.config import PretrainConfig, get_preset

RUNGS = ("dense-12", "tree-24x2", "tree-6x5+36", "leaf-5x67")
SMALL = {
    "tokenizer": "train:300",
    "layers": 1,
    "d_model": 16,
    "heads": 2,
    "sequence": 16,
    "batch": 4,
    "steps": 6,
    "warmup_steps": 1,
    "evaluate_every": 3,
    "checkpoint_every": 6,
}


def small(text_file, **changes) -> PretrainConfig:
    return PretrainConfig.from_flat(get_preset("small") | SMALL | {"data": str(text_file)} | changes)


@pytest.fixture(scope="module")
def made(text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("ladder") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROUNDS", 2)
        return output, tree_ladder(small(text_file), output, seeds=1, rungs=RUNGS)


def test_rungs_compare_what_they_say() -> None:
    active, total = {}, {}
    for name, rung in ladder().items():
        facts = module._facts(rung, PretrainConfig.from_flat(get_preset("small")))
        active[name], total[name] = facts["active"], facts["total"]
    assert {
        active[name] for name in ladder() if name.startswith("tree") and "1x11" not in name and "128" not in name
    } == {ACTIVE}
    assert {active[name] for name in ("dense-72", "leaf-5x67", "moe-2x36")} == {ACTIVE}
    assert (active["tree-1x11"], total["tree-1x11"]) == (12, 4095)
    assert (active["tree-128x4"], total["tree-128x4"]) == (640, 3968)
    assert (total["tree-8x8"], total["tree-12x5"], total["tree-4x8+36"]) == (4088, 756, 2080)
    assert total["dense-4088"] == active["dense-4088"] == 4088


def test_runs_are_what_rungs_say(text_file) -> None:
    config, rungs = small(text_file), ladder()
    run = run_of(config, rungs["tree-8x8-fast"], 3)
    assert (run.ffn, run.ffn_options, run.seed, run.baseline) == ("neuron_tree", {"trees": 8, "depth": 8}, 3, False)
    assert run.factor_learning_rate == pytest.approx(3 * config.learning_rate)
    # Alike for all: what dense FFNs learn at is what trees' rates are relative to.
    faster = dataclasses.replace(config, ffn_learning_rate=2 * config.learning_rate)
    assert run_of(faster, rungs["dense-640"], 0).ffn_learning_rate == 2 * config.learning_rate
    trees = [run_of(faster, rungs[name], 0) for name in ("tree-8x8", "tree-8x8-fast")]
    assert [run.factor_learning_rate / config.learning_rate for run in trees] == pytest.approx([2, 6])
    run = run_of(config, rungs["dense-640"], 0)
    assert (run.ffn, run.d_hidden, run.factor_learning_rate) == ("dense", 640, None)
    repaired = run_of(config, rungs["tree-4x8+36-repaired"], 0).ffn_config()
    assert (repaired.straight_through, repaired.start, repaired.shared) == (True, "normal", 36)


def test_everything_is_there(made) -> None:
    output, result = made
    assert json.loads((output / "result.json").read_text()) == result
    assert (output / "table.md").read_text() == report(result)
    assert list(result["rungs"]) == [name for name in ladder() if name in RUNGS]
    for name, rung in result["rungs"].items():
        kept = json.loads((output / "runs" / f"{name}-seed-0" / "results.json").read_text())
        (stage,) = kept["stages"].values()
        assert rung["seeds"][0]["validation_loss"] == stage["validation_loss"]
        assert kept["config"]["tokenizer"] == str(output / "tokenizer")
    assert set(result["step"]["seconds"]) == set(RUNGS)
    assert all(name in table(result) for name in RUNGS)


def test_what_trees_are_worth(made) -> None:
    _, result = made
    usage = result["rungs"]["tree-24x2"]["seeds"][0]["usage"]
    assert usage["leaves"] == 4 and 1 <= usage["effective_leaves"] <= 4
    assert len(usage["loss_by_level"]) == 3
    assert usage["loss_by_level"][-1] == usage["loss"] != usage["loss_by_level"][0]
    assert usage["loss_of_wrong_paths"] != usage["loss"]
    assert result["rungs"]["dense-12"]["seeds"][0]["usage"] is None


def test_last_nodes_are_the_reference_s() -> None:
    tree = NeuronTreeFFN(NeuronTreeConfig(d_model=8, depth=3, trees=2))
    x = torch.randn(50, 8)
    _, _, last = reference.neuron_tree(x, tree.w_in, tree.b_in, tree.w_out)
    assert torch.equal(last_nodes(tree, x), last.T - 7)


def test_mirrored_trees_take_the_other_path() -> None:
    nodes = torch.arange(7).view(1, 7, 1)
    assert _mirrored(nodes).flatten().tolist() == [0, 2, 1, 6, 5, 4, 3]


def test_the_same_call_goes_on(made, text_file, monkeypatch) -> None:
    output, result = made
    monkeypatch.setattr(module, "pretrain", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(module, "compare_steps", lambda *_, **__: pytest.fail("timed again"))
    again = tree_ladder(small(text_file), output, seeds=1, rungs=RUNGS)
    assert (again["rungs"], again["step"]) == (result["rungs"], result["step"])
    with pytest.raises(OutputError, match="layers was 1, now 2"):
        tree_ladder(small(text_file, layers=2), output, rungs=RUNGS)


def test_bad_input_leaves_nothing_behind(text_file, tmp_path) -> None:
    output = tmp_path / "runs"
    with pytest.raises(ConfigError, match=r"Unknown rung 'tree-8x9'.*Did you mean 'tree-8x8'"):
        tree_ladder(small(text_file), output, rungs=("tree-8x9",))
    with pytest.raises(ConfigError, match="seeds is 0"):
        tree_ladder(small(text_file), output, seeds=0)
    with pytest.raises(ConfigError, match="chooses the FFNs itself"):
        tree_ladder(dataclasses.replace(small(text_file), d_hidden=7), output)
    with pytest.raises(ConfigError, match="predict the next token, not of bert"):
        tree_ladder(small(text_file, architecture="bert"), output)
    assert not output.exists()
