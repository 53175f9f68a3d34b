"""Ordinary runs, and runs that start from a checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastffn.hf  # noqa: F401
from fastffn.errors import CheckpointError, ConfigError, DataError
from fastffn.train.config import start_fields
from fastffn.train.pretrain import pretrain
from fastffn.train.trainer import StageTrainer
from tests.train.test_pretrain import tiny

DENSE = {"ffn": "dense", "rank": None}


@pytest.fixture(scope="module")
def first(text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("first") / "run"
    return output, pretrain(tiny(text_file, **DENSE), output)


def test_an_ordinary_run(first) -> None:
    output, results = first
    assert set(results["stages"]) == {"dense"}
    assert results["time_to_loss"] == {} and results["gain"] is None
    assert not (output / "gain.json").exists()
    report = (output / "report.md").read_text()
    assert report.startswith("# Pre-training\n")
    assert "two-stage" not in report and "factorised" not in report
    assert results["sample"]["continuation"]


def test_it_is_the_baseline_of_a_two_stage_run(first, text_file, tmp_path) -> None:
    beside = pretrain(tiny(text_file), tmp_path / "run")
    assert beside["stages"]["dense"]["validation_loss"] == first[1]["stages"]["dense"]["validation_loss"]


@pytest.fixture
def started(monkeypatch) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that each stage of the runs to come starts from, by its name."""
    weights = {}
    train = StageTrainer.train

    def look(self, *args, **kwargs):
        weights[self.stage.name] = {name: value.clone() for name, value in self.model.state_dict().items()}
        return train(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", look)
    return weights


def test_a_run_goes_on_from_a_checkpoint_on_other_text(first, tmp_path, started) -> None:
    output, _ = first
    other = tmp_path / "other.txt"
    other.write_text("no machine forgets the long road.\n" * 1000)
    config = tiny(other, init_from=str(output / "dense"), tokenizer=str(output / "dense"), dropout=0.1)
    results = pretrain(config, tmp_path / "run")
    before = AutoModelForCausalLM.from_pretrained(output / "dense").state_dict()
    assert all(torch.equal(started["dense"][name], value) for name, value in before.items())
    # The factorised stage starts from the same weights, as far as factors can be them.
    ours = started["stage1"]
    product = ours["transformer.h.0.mlp.up.b.weight"] @ ours["transformer.h.0.mlp.up.a.weight"]
    dense = before["transformer.h.0.mlp.c_fc.weight"].T
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(product, (u[:, :4] * s[:4]) @ vh[:4], rtol=0, atol=1e-6)
    for name in ("transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"):
        assert torch.equal(ours[name], before[name])
    assert results["stages"]["dense"]["curve"][0]["loss"] < 5.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage2").config.resid_pdrop == 0.1
    assert f"From {output / 'dense'}." in (tmp_path / "run" / "report.md").read_text()


def test_shape_and_tokenizer_come_from_the_checkpoint(first) -> None:
    output, _ = first
    fields = start_fields(str(output / "dense"))
    assert fields["layers"] == 2 and fields["d_model"] == 16 and fields["heads"] == 2
    assert fields["tokenizer"] == str(output / "dense")
    assert fields["initializer_range"] is None


def test_all_stages_start_from_weights_of_one_spread(text_file, tmp_path, started) -> None:
    pretrain(tiny(text_file, initializer_range=0.1), tmp_path / "run")
    for stage in ("dense", "stage1"):
        assert abs(started[stage]["transformer.wte.weight"].std() - 0.1) < 0.005
    assert abs(started["dense"]["transformer.h.0.mlp.c_fc.weight"].std() - 0.1) < 0.01
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage2")
    assert merged.config.initializer_range == 0.1


def test_what_cannot_be_a_start(first, text_file, tmp_path) -> None:
    output, _ = first
    start = str(output / "dense")
    with pytest.raises(ConfigError, match=r"d_model is 32, but the checkpoint .* has 16; leave it out"):
        pretrain(tiny(text_file, init_from=start, d_model=32), tmp_path / "run")
    with pytest.raises(CheckpointError, match="not a directory"):
        pretrain(tiny(text_file, init_from="nowhere"), tmp_path / "run")
    # Of the right size, but with other meanings.
    with pytest.raises(DataError, match=r"has 300 tokens, the checkpoint .* 300: they do not belong together"):
        pretrain(tiny(text_file, init_from=start, tokenizer="train:300"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"init_from is .*dense, inside the run's own directory"):
        pretrain(tiny(text_file, init_from=start, tokenizer=start), output)
    with pytest.raises(ConfigError, match=r"sequence is 32, but the checkpoint .* takes 16"):
        pretrain(tiny(text_file, init_from=start, sequence=32), tmp_path / "run")
    run = tmp_path / "two-stage"
    pretrain(tiny(text_file, baseline=False), run)
    with pytest.raises(CheckpointError, match="fastffn merge"):
        pretrain(tiny(text_file, init_from=str(run / "stage1")), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"is a run, not a checkpoint. Did you mean .*stage2"):
        pretrain(tiny(text_file, init_from=str(run)), tmp_path / "run")
    shutil.copytree(output / "dense", tmp_path / "t5")
    config = tmp_path / "t5" / "config.json"
    config.write_text(config.read_text().replace('"gpt2"', '"t5"'))
    with pytest.raises(CheckpointError, match="type 't5'"):
        pretrain(tiny(text_file, init_from=str(tmp_path / "t5")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recomputing_activations_changes_nothing_but_memory(text_file, tmp_path, first, monkeypatch) -> None:
    step, recomputed = StageTrainer.training_step, set()

    def look(self, model, *args, **kwargs):
        recomputed.add((self.stage.name, model.transformer.h[0].gradient_checkpointing))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", look)
    again = pretrain(tiny(text_file, **DENSE, gradient_checkpointing=True), tmp_path / "dense")
    assert again["stages"]["dense"]["validation_loss"] == first[1]["stages"]["dense"]["validation_loss"]
    two_stage = pretrain(tiny(text_file, baseline=False, gradient_checkpointing=True), tmp_path / "two")
    assert recomputed == {("dense", True), ("stage1", True), ("stage2", True)}
    plain = pretrain(tiny(text_file, baseline=False), tmp_path / "plain")
    for name in ("stage1", "stage2"):
        assert two_stage["stages"][name]["validation_loss"] == plain["stages"][name]["validation_loss"]
