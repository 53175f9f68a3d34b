"""Kinds that do not merge: one stage, beside the dense baseline."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastffn
import fastffn.hf
from fastffn.registry import get_kind, kinds
from fastffn.train.config import mergeable_kinds
from fastffn.train.plan import plan_stages
from fastffn.train.pretrain import pretrain
from fastffn.train.trainer import SWITCHED, StageTrainer
from tests.train.test_pretrain import tiny

KINDS = [
    name for name, kind in kinds().items() if name != "dense" and name not in mergeable_kinds() and kind.config.TRAINS
]
# Small enough for a model of width 16.
SIZES = {"leaf_tree": {"depth": 2, "leaf_width": 8}, "neuron_tree": {"depth": 3, "trees": 4}, "moe": {"experts": 4}}


def run(name: str, text_file, output, **changes):
    return pretrain(tiny(text_file, ffn=name, rank=None, **SIZES.get(name, {}), **changes), output)


@pytest.mark.parametrize("name", KINDS)
def test_a_run(name, text_file, tmp_path) -> None:
    results = run(name, text_file, tmp_path / "run")
    assert list(results["stages"]) == ["dense", name]
    assert results["stages"][name]["steps"] == 20
    curve = results["stages"][name]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert set(results["time_to_loss"]) == {"dense"} and results["gain"] is None
    # Biases of trees and experts are matrices by their shape, and yet no weight decay acts on them.
    saved = torch.load(tmp_path / "run" / name / "checkpoint-20" / "optimizer.pt", weights_only=True)["param_groups"]
    groups = [{n for n in group["param_names"] if ".mlp." in n} for group in saved]
    assert {n for n in groups[1] | groups[SWITCHED] if "bias" in n or n.endswith("b_in")} == groups[1] and groups[1]
    assert [group["weight_decay"] for group in saved] == [0.1, 0.0, 0.1] and groups[SWITCHED] and not groups[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
    assert type(model.transformer.h[0].mlp) is get_kind(name).module
    assert len(results["sample"]["continuation"]) > 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"; {name}, " in report and "two-stage" not in report.lower()
    # The same command shows it again; another one may delete it.
    assert run(name, text_file, tmp_path / "run") == json.loads((tmp_path / "run" / "results.json").read_text())
    pretrain(tiny(text_file, baseline=False), tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / name).exists()


@pytest.mark.parametrize("name", KINDS)
def test_interrupted_it_ends_the_same(name, text_file, tmp_path, monkeypatch) -> None:
    whole = run(name, text_file, tmp_path / "whole", baseline=False, dropout=0.1)
    step = StageTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(name, text_file, tmp_path / "run", baseline=False, dropout=0.1)
    again = run(name, text_file, tmp_path / "run", baseline=False, dropout=0.1)
    assert again["stages"][name]["validation_loss"] == whole["stages"][name]["validation_loss"]


def test_what_a_kind_asks_for_is_part_of_the_training_loss(text_file, tmp_path, monkeypatch) -> None:
    """Also where a step is made of several batches: the sum over them is the mean that one batch would have."""
    seen: dict[str, list[tuple[float, float, float]]] = {}
    compute = StageTrainer.compute_loss

    def look(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = compute(self, model, inputs, True, num_items_in_batch)
        if model.training:
            extra = float(fastffn.auxiliary_loss(self.model).detach())
            task = float(outputs.loss.detach()) if hasattr(outputs, "loss") else float(outputs["loss"])
            seen.setdefault(self.args.output_dir, []).append((float(loss.detach()), task, extra))
        return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(StageTrainer, "compute_loss", look)
    for micro in (4, 2):
        run("moe", text_file, tmp_path / str(micro), baseline=False, micro_batch=micro, steps=3, warmup_steps=1)
    whole, halves = (seen[str(tmp_path / str(micro) / "moe")] for micro in (4, 2))
    assert all(extra > 0 for _, _, extra in whole)
    for loss, task, extra in whole:
        assert loss == pytest.approx(task + extra, rel=1e-6)
    for loss, task, extra in halves:
        assert loss == pytest.approx(task + extra / 2, rel=1e-6)


def test_validation_is_the_task_alone(text_file, tmp_path) -> None:
    results = run("moe", text_file, tmp_path / "run", baseline=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "moe").eval()
    from fastffn.data.blocks import token_blocks
    from fastffn.data.tokenizer import load_tokenizer

    config = tiny(text_file)
    blocks = token_blocks(
        config.data,
        load_tokenizer(str(tmp_path / "run" / "tokenizer")),
        config.sequence,
        validation_fraction=config.validation_fraction,
    )
    ids = torch.tensor(blocks.validation["input_ids"][:])
    with torch.no_grad():
        logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    assert results["stages"]["moe"]["validation_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_dense_ffns_may_have_a_rate_of_their_own(text_file) -> None:
    def rates(stage: str = "dense", **changes) -> tuple[float, float, int]:
        found = plan_stages(tiny(text_file, learning_rate=1e-3, **changes), 20)[stage]
        return found.learning_rate, found.switched_learning_rate, found.dense_layers

    alone = {"ffn": "dense", "rank": None}
    assert rates(**alone) == (1e-3, 1e-3, 0)
    assert rates(**alone, ffn_learning_rate=2e-3) == (1e-3, 2e-3, 0)
    assert rates(**alone, dense_learning_rate=3e-3) == (3e-3, 3e-3, 0)
    assert rates(**alone, dense_learning_rate=3e-3, ffn_learning_rate=2e-3, dense_layers=1) == (3e-3, 2e-3, 1)
    both = {"factor_learning_rate": 2e-3, "ffn_learning_rate": 5e-4, "dense_layers": 1, "dense_warmup": 0.1}
    # Beside factors, which have theirs, it is the baseline's and that of the merged ones.
    assert rates(**both) == rates("warmup", **both) == rates("stage2", **both) == (1e-3, 5e-4, 1)
    assert rates("stage1", **both) == (1e-3, 2e-3, 1)
    assert rates("stage2", factor_learning_rate=2e-3) == rates(factor_learning_rate=2e-3) == (1e-3, 1e-3, 0)
