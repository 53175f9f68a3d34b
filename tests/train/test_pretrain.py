"""The main job, small: from text to a report, and from an interruption back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import fastffn.hf  # noqa: F401
from fastffn import LowRankFFN
from fastffn.errors import CheckpointError, ConfigError, DataError, OutputError, TrainingDivergedError
from fastffn.train import pretrain as module
from fastffn.train.config import PretrainConfig, get_preset
from fastffn.train.gain import advice
from fastffn.train.pretrain import pretrain
from fastffn.train.text import spread
from fastffn.train.trainer import StageTrainer

SMALL = {
    "tokenizer": "train:300",
    "validation_fraction": 0.04,
    "layers": 2,
    "d_model": 16,
    "heads": 2,
    "sequence": 16,
    "rank": 4,
    "steps": 20,
    "switch": 0.6,
    "learning_rate": 3e-3,
    "dense_layers": None,
    "dense_learning_rate": None,
    "factor_learning_rate": None,
    "ffn_learning_rate": None,
    "warmup_steps": 4,
    "rewarm_steps": 4,
    "evaluate_every": 4,
    "checkpoint_every": 4,
    "log_every": 4,
}


def tiny(text_file, **changes) -> PretrainConfig:
    return PretrainConfig.from_flat(get_preset("demo") | SMALL | {"data": str(text_file)} | changes)


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, pretrain(tiny(text_file), output), tiny(text_file)


def test_everything_is_there(finished) -> None:
    output, results, _ = finished
    assert {path.name for path in output.iterdir()} == {
        ".fastffn.lock",
        "config.yaml",
        "dense",
        "stage1",
        "merged",
        "stage2",
        "tokenizer",
        "text.json",
        "gain.json",
        "results.json",
        "report.md",
        "loss_vs_time.png",
    }
    assert json.loads((output / "results.json").read_text()) == results
    assert [r["steps"] for r in (results["stages"][n] for n in ("dense", "stage1", "stage2"))] == [20, 12, 8]
    assert results["stages"]["dense"]["tokens"] == 20 * 4 * 16
    assert results["time_to_loss"]["dense"]["target"] == results["stages"]["dense"]["validation_loss"]
    assert results["sample"]["continuation"]


def test_what_has_been_measured_is_said_before_anything_is_trained(text_file, tmp_path, capsys) -> None:
    pretrain(tiny(text_file), tmp_path / "run")
    said = capsys.readouterr().out
    assert 0 < said.index("train dense: --ffn dense") < said.index("dense  step ")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "dense")
    seen = 20 * 4 * 16 / sum(parameter.numel() for parameter in model.parameters())
    assert f"sees {seen:.2g} tokens for each parameter" in said


def test_the_advice_is_that_of_the_length_of_the_run() -> None:
    assert "--ffn narrow" in advice(4.4) and "fits the budget" in advice(4.4)
    assert "was gone" in advice(23.0) and "--ffn narrow" not in advice(23.0)
    assert "sees 0.34 tokens" in advice(0.337) and "sees 1,234 tokens" in advice(1234.2)
    assert all("--ffn dense" in advice(seen) for seen in (0.1, 10.9, 11.1, 100.0))


def test_it_learns(finished) -> None:
    _, results, _ = finished
    for name in ("dense", "stage2"):
        curve = results["stages"][name]["curve"]
        assert curve[-1]["loss"] < curve[0]["loss"]
    assert results["stages"]["dense"]["validation_loss"] < 5.0  # log(300) = 5.7 at the start


def test_seconds_add_up(finished) -> None:
    _, results, _ = finished
    stages = results["stages"]
    before = stages["stage1"]["seconds"] + stages["merge"]["seconds"]
    assert stages["stage2"]["seconds"] == pytest.approx(before + stages["stage2"]["own_seconds"])
    assert all(point["seconds"] > before for point in stages["stage2"]["curve"])


def test_every_stage_loads_with_transformers(finished) -> None:
    output, _, _ = finished
    for name, factorised in (("dense", False), ("stage1", True), ("merged", False), ("stage2", False)):
        model, info = AutoModelForCausalLM.from_pretrained(output / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert isinstance(model.transformer.h[0].mlp, LowRankFFN) is factorised
        assert (output / name / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["merged", "stage2"])
def test_dense_checkpoints_need_nothing_of_ours(finished, name, tmp_path) -> None:
    output, _, _ = finished
    ids = torch.arange(12)[None]
    logits = AutoModelForCausalLM.from_pretrained(output / name).eval()(ids).logits.detach()
    torch.save(logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()(torch.arange(12)[None]).logits\n"
        "assert 'fastffn' not in sys.modules\n"
        "assert torch.equal(logits, torch.load(sys.argv[2], weights_only=True))\n"
    )
    command = [sys.executable, "-c", code, str(output / name), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "fastffn" not in (output / name / "config.json").read_text()


def test_a_finished_run_is_shown_again_and_not_trained(finished, monkeypatch) -> None:
    output, results, config = finished
    monkeypatch.setattr(module, "_Run", None)
    assert pretrain(config, output) == results


def test_another_run_is_refused(finished, text_file) -> None:
    output, _, _ = finished
    with pytest.raises(OutputError, match=r"seed: 0 there, 9 here"):
        pretrain(tiny(text_file, seed=9), output)
    assert (output / "results.json").is_file()


def weights(directory) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


@pytest.mark.parametrize("where", [("dense", 9), ("stage1", 6), ("stage2", 17)], ids=str)
def test_an_interrupted_run_goes_on_and_ends_the_same(finished, text_file, tmp_path, monkeypatch, where) -> None:
    output, results, config = finished
    name, at = where
    step = StageTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if (self.stage.name, self.state.global_step) == (name, at):
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    again = pretrain(config, tmp_path / "run")
    for stage in ("dense", "stage2"):
        ours, theirs = weights(tmp_path / "run" / stage), weights(output / stage)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), stage
        assert again["stages"][stage]["validation_loss"] == results["stages"][stage]["validation_loss"]
        assert [p["step"] for p in again["stages"][stage]["curve"]] == [
            p["step"] for p in results["stages"][stage]["curve"]
        ]
    seconds = [point["seconds"] for point in again["stages"]["stage2"]["curve"]]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("missing", ["stage1", "merged", "stage2"])
def test_killed_just_before_a_stage_was_marked_as_finished(finished, tmp_path, missing) -> None:
    """The last checkpoint is there, `stage.json` is not: no step may be trained twice or too many."""
    output, results, config = finished
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / missing / "stage.json").unlink()
    later = {"stage1": ("merged", "stage2"), "merged": ("stage2",), "stage2": ()}[missing]
    for name in later:
        shutil.rmtree(tmp_path / "run" / name)
    again = pretrain(config, tmp_path / "run")
    ours, theirs = weights(tmp_path / "run" / "stage2"), weights(output / "stage2")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for stage in ("stage1", "stage2"):
        steps = [[point["step"] for point in r["stages"][stage]["curve"]] for r in (again, results)]
        assert steps[0] == steps[1]
    assert not (tmp_path / "run" / "stage1" / "checkpoint-13").exists()


def test_validation_loss_is_that_of_all_blocks(finished) -> None:
    """Against a cross-entropy of our own over every predicted token of every block."""
    from fastffn.data.blocks import token_blocks
    from fastffn.data.tokenizer import load_tokenizer

    output, results, config = finished
    blocks = token_blocks(
        config.data,
        load_tokenizer(str(output / "tokenizer")),
        config.sequence,
        validation_fraction=config.validation_fraction,
    )
    assert len(blocks.validation) % config.batch  # the last batch is smaller
    ids = torch.tensor(blocks.validation["input_ids"][:])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(output / "stage2").eval()(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    assert results["stages"]["stage2"]["validation_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_fewer_validation_blocks_than_a_batch(text_file, tmp_path) -> None:
    config = tiny(text_file, baseline=False, validation_fraction=0.005, batch=16)
    assert pretrain(config, tmp_path / "run")["stages"]["stage2"]["validation_loss"] > 0


def test_changed_text_is_noticed(text_file, tmp_path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    pretrain(tiny(text, baseline=False), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    # Fetched again, with another time: the same text.
    shutil.copy(text_file, text)
    pretrain(tiny(text, baseline=False), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    text.write_text("no machine forgets the long road.\n" * 2000)
    with pytest.raises(OutputError, match=rf"The text \({re.escape(str(text))}\) has changed since the run"):
        pretrain(tiny(text, baseline=False), tmp_path / "run")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_missing_training_state_is_named(finished, tmp_path, name) -> None:
    output, _, config = finished
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "stage2")
    (tmp_path / "run" / "merged" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"merged/{name} is missing"):
        pretrain(config, tmp_path / "run")


def batches_of(config, output, monkeypatch) -> dict[str, list]:
    seen: dict[str, list] = {}
    step = StageTrainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        seen.setdefault(self.stage.name, []).append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", record)
        pretrain(config, output)
    return seen


def test_both_runs_see_the_same_data_in_the_same_order(text_file, tmp_path, monkeypatch) -> None:
    seen = batches_of(tiny(text_file, dense_warmup=0.2), tmp_path / "run", monkeypatch)
    assert seen["warmup"] + seen["stage1"] + seen["stage2"] == seen["dense"]
    assert len(seen["dense"]) == 20
    assert [len(seen[name]) for name in ("warmup", "stage1", "stage2")] == [4, 8, 8]


def test_the_published_way(text_file, tmp_path, monkeypatch) -> None:
    """Each stage one epoch with its own schedule; dense once for one epoch, once for two."""
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:9000])
    changes = {"restart": True, "schedule": "cosine", "steps": None, "epochs": 1.0, "start": "normal"}
    config = tiny(short, **changes, checkpoint_every=100)
    seen = batches_of(config, tmp_path / "run", monkeypatch)
    epoch = len(seen["dense"])
    assert len(seen["stage1"]) == len(seen["stage2"]) == epoch
    assert len(seen["dense_equal_tokens"]) == 2 * epoch
    assert seen["stage1"] + seen["stage2"] == seen["dense_equal_tokens"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["time_to_loss"]) == {"dense", "dense_equal_tokens"}
    assert not (tmp_path / "run" / "merged" / "optimizer.pt").exists()


def test_without_a_baseline(text_file, tmp_path) -> None:
    results = pretrain(tiny(text_file, baseline=False), tmp_path / "run")
    assert "dense" not in results["stages"]
    assert results["time_to_loss"] == {}
    assert (tmp_path / "run" / "loss_vs_time.png").is_file()


def test_micro_batches_and_bfloat16(text_file, tmp_path) -> None:
    settings = {"baseline": False, "steps": 10, "warmup_steps": 2}
    whole = pretrain(tiny(text_file, **settings), tmp_path / "whole")
    pieces = pretrain(tiny(text_file, **settings, micro_batch=2), tmp_path / "pieces")
    half = pretrain(tiny(text_file, **settings, precision="bf16"), tmp_path / "half")
    loss = {
        name: r["stages"]["stage2"]["validation_loss"]
        for name, r in (("whole", whole), ("pieces", pieces), ("half", half))
    }
    assert loss["pieces"] == pytest.approx(loss["whole"], abs=1e-3)
    assert loss["half"] == pytest.approx(loss["whole"], abs=0.05)
    assert loss["half"] != loss["whole"]


def test_nan_keeps_the_last_checkpoint(text_file, tmp_path) -> None:
    with pytest.raises(TrainingDivergedError, match="loss is nan in step"):
        pretrain(tiny(text_file, learning_rate=1e30, clip=0.0, warmup_steps=0), tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_damaged_checkpoint_is_named(finished, tmp_path) -> None:
    output, _, config = finished
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    damaged = tmp_path / "run" / "stage1" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"stage1/model\.safetensors is corrupt or cut short"):
        pretrain(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, name, capsys) -> None:
    output, _, config = finished
    shutil.copytree(output, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "stage2" / "stage.json").unlink()
    damaged = tmp_path / "run" / "stage2" / "checkpoint-20" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    pretrain(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"checkpoint-20 is ignored: {name} has " in said
    assert "stage2: going on from checkpoint-16." in said
    for key, value in weights(tmp_path / "run" / "stage2").items():
        assert torch.equal(value, weights(output / "stage2")[key])


def test_wrong_text_leaves_nothing_behind(tmp_path, text_file) -> None:
    with pytest.raises(DataError, match="does not exist"):
        pretrain(tiny(tmp_path / "missing.txt"), tmp_path / "run")
    with pytest.raises(ConfigError, match="Name a text with --data"):
        pretrain(PretrainConfig.from_flat(get_preset("gpt2-small")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_vocabulary_and_tokenizer_must_fit(tmp_path, text_file) -> None:
    with pytest.raises(DataError, match="has 300 tokens, but vocabulary is 301"):
        pretrain(tiny(text_file, vocabulary=301), tmp_path / "run")


def test_too_few_steps_for_the_stages(tmp_path, text_file) -> None:
    with pytest.raises(ConfigError, match="too few for a switch"):
        pretrain(tiny(text_file, steps=1), tmp_path / "run")


def test_the_configuration_is_kept(finished) -> None:
    output, _, config = finished
    assert PretrainConfig.from_flat(yaml.safe_load((output / "config.yaml").read_text())) == config


def test_tensorboard(finished) -> None:
    output, _, _ = finished
    assert list((output / "stage2" / "runs").rglob("events.out.tfevents*"))


def test_a_large_validation_text_is_sampled_evenly(text_file, tmp_path) -> None:
    rows = datasets.Dataset.from_dict({"n": range(10)})
    assert spread(rows, 4)["n"][:] == [0, 2, 5, 7]
    assert spread(rows, 10) is rows
    whole, sampled = (
        pretrain(tiny(text_file, ffn="dense", rank=None, validation_blocks=most), tmp_path / str(most))
        for most in (999, 7)
    )
    assert whole["text"]["validation_tokens"] > sampled["text"]["validation_tokens"] == 7 * 16
    assert whole["stages"]["dense"]["validation_loss"] != sampled["stages"]["dense"]["validation_loss"]


def test_a_missing_last_checkpoint_is_not_replaced_by_an_older_one(finished, tmp_path) -> None:
    """Stage 2 would begin below the switch, and train too long."""
    output, results, config = finished
    shutil.copytree(output, tmp_path / "run")
    for name in ("stage2", "merged", "stage1/checkpoint-12"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-12 is needed to go on, but it is missing. Delete .*stage\.json"
    ):
        pretrain(config, tmp_path / "run")
    (tmp_path / "run" / "stage1" / "stage.json").unlink()
    again = pretrain(config, tmp_path / "run")
    assert again["stages"]["stage2"]["validation_loss"] == results["stages"]["stage2"]["validation_loss"]


def test_changed_text_and_overwrite_begin_anew(text_file, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    pretrain(tiny(text, baseline=False), tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    text.write_text("no machine forgets the long road.\n" * 2000)
    pretrain(tiny(text, baseline=False), tmp_path / "run", overwrite=True)
    fresh = pretrain(tiny(text, baseline=False), tmp_path / "fresh")
    for key, value in weights(tmp_path / "fresh" / "stage2").items():
        assert torch.equal(value, weights(tmp_path / "run" / "stage2")[key])
    assert fresh["stages"]["stage2"]["steps"] == 8


def test_an_optimizer_that_transformers_lacks(text_file, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer is 'adamw_tourch'; transformers has .*adamw_torch_fused"):
        pretrain(tiny(text_file, optimizer="adamw_tourch"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*/"))
