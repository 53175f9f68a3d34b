"""The switch of stages changes the FFNs and nothing else."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastffn import LowRankFFN
from fastffn.errors import CheckpointError
from fastffn.train.pretrain import _Run
from fastffn.train.switch import factorise_stage, merge_stage
from fastffn.train.trainer import SWITCHED
from tests.train.test_pretrain import tiny


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory) -> _Run:
    rates = {"factor_learning_rate": 7e-3, "ffn_learning_rate": 5e-3}
    return _Run(tiny(text_file, dense_warmup=0.25, **rates), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def switched(run):
    """Warm-up, factorised, stage 1, merged: (directories, stages)."""
    stages = run.stages
    run._train(stages["warmup"])
    before = run._final_checkpoint("warmup")
    start = run.output / "factorised"
    factorise_stage(before, start, run.config.ffn_config(), lambda m: run._trainer(stages["stage1"], m))
    run._train(stages["stage1"], model=start, seconds=0.0, carry=True)
    middle = run._final_checkpoint("stage1")
    merged = run.output / "merged"
    merge_stage(middle, merged, lambda m: run._trainer(stages["stage2"], m))
    return before, start, middle, merged, stages


def states(checkpoint) -> dict[str, dict]:
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return {
        name: saved["state"].get(number)
        for group in saved["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }


def same(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_merged_tensors_start_afresh_all_others_keep_their_state(switched) -> None:
    _, _, middle, merged, _ = switched
    old, new = states(middle), states(merged)
    fresh = {name for name, state in new.items() if state is None}
    assert fresh == {f"transformer.h.{i}.mlp.{m}.weight" for i in range(2) for m in ("c_fc", "c_proj")}
    renamed = {"c_fc.bias": "up.b.bias", "c_proj.bias": "down.b.bias"}
    for name, state in new.items():
        if state is not None:
            before = name
            for ours, theirs in renamed.items():
                before = before.replace(f"mlp.{ours}", f"mlp.{theirs}")
            assert same(state, old[before]), name
            assert state["exp_avg"].abs().sum() > 0


def test_factors_start_afresh_too(switched) -> None:
    before, start, _, _, _ = switched
    old, new = states(before), states(start)
    fresh = {name for name, state in new.items() if state is None}
    assert len(fresh) == 8
    assert all(name.endswith(("a.weight", "b.weight")) for name in fresh)
    assert same(new["transformer.h.1.mlp.down.b.bias"], old["transformer.h.1.mlp.c_proj.bias"])
    assert isinstance(AutoModelForCausalLM.from_pretrained(start).transformer.h[0].mlp, LowRankFFN)


def test_hyperparameters_are_those_of_the_next_stage(switched) -> None:
    before, start, middle, merged, _ = switched
    places = (before, start, middle, merged)
    groups = [torch.load(place / "optimizer.pt", weights_only=True)["param_groups"] for place in places]
    # Frobenius decay has that of the factors.
    assert [of[SWITCHED]["weight_decay"] for of in groups] == [0.1, 0.0, 0.0, 0.1]
    assert [of[SWITCHED]["initial_lr"] for of in groups] == [5e-3, 7e-3, 7e-3, 5e-3]
    assert {of[group]["initial_lr"] for of in groups for group in (0, 1)} == {3e-3}


def test_the_schedule_goes_on_and_merged_tensors_rewarm(run, switched) -> None:
    _, _, _, merged, stages = switched
    stage = stages["stage2"]
    trainer = run._trainer(stage, merged)
    rates: list[list[float]] = []
    step = trainer.training_step

    def record(*args, **kwargs):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        return step(*args, **kwargs)

    trainer.training_step = record
    trainer.train(resume_from_checkpoint=str(merged))
    # Warm-up is over, the decay takes the last 30 % of 20 steps, from step 14 on.
    base = [3e-3] * 2 + [3e-3 * (1 - i / 6) for i in range(6)]
    assert [r[0] for r in rates] == pytest.approx(base)
    ramp = [min(1.0, (i + 1) / 4) for i in range(8)]
    assert [r[SWITCHED] for r in rates] == pytest.approx([5 / 3 * b * f for b, f in zip(base, ramp, strict=True)])


def test_the_merged_model_is_the_factorised_one(switched) -> None:
    _, _, middle, merged, _ = switched
    ids = torch.arange(10)[None]
    factorised, dense = (AutoModelForCausalLM.from_pretrained(c).eval()(ids).logits for c in (middle, merged))
    torch.testing.assert_close(dense, factorised, rtol=1e-4, atol=1e-5)
    tensors = [load_file(c / "model.safetensors") for c in (middle, merged)]
    assert torch.equal(tensors[0]["transformer.h.0.mlp.up.b.bias"], tensors[1]["transformer.h.0.mlp.c_fc.bias"])


def test_a_damaged_optimizer_is_named_and_nothing_is_left(run, switched, tmp_path) -> None:
    import shutil

    _, _, middle, _, stages = switched
    shutil.copytree(middle, tmp_path / "source")
    damaged = tmp_path / "source" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is corrupt"):
        merge_stage(tmp_path / "source", tmp_path / "out", lambda m: run._trainer(stages["stage2"], m))
    damaged.unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        merge_stage(tmp_path / "source", tmp_path / "out", lambda m: run._trainer(stages["stage2"], m))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ffns_that_stay_dense_keep_their_optimizer_state(text_file, tmp_path) -> None:
    run = _Run(tiny(text_file, dense_warmup=0.25, dense_layers=1), tmp_path)
    warm = run._train(run.stages["warmup"])
    run._factorise()
    run._train(run.stages["stage1"], model=tmp_path / "factorised", seconds=warm["seconds"], carry=True)
    run._merge()
    stays = [f"transformer.h.0.mlp.{m}.weight" for m in ("c_fc", "c_proj")]
    for checkpoint in (run._final_checkpoint("warmup"), tmp_path / "factorised", tmp_path / "merged"):
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        assert set(stays) <= set(saved["param_groups"][0]["param_names"])
        switched_names = saved["param_groups"][SWITCHED]["param_names"]
        assert switched_names and all(name.startswith("transformer.h.1.mlp.") for name in switched_names)
        assert all(states(checkpoint)[name] is not None for name in stays)
    middle, merged = states(run._final_checkpoint("stage1")), states(tmp_path / "merged")
    assert all(same(middle[name], merged[name]) for name in stays)
