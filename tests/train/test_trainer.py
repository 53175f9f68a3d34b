from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from transformers import TrainingArguments

import fastffn
from fastffn import LowRankConfig
from fastffn.errors import TrainingDivergedError
from fastffn.train.plan import Stage
from fastffn.train.trainer import SWITCHED, Clock, StageTrainer, parameter_groups, rewarmed

STAGE = Stage(
    name="stage1",
    factorised=True,
    end=4,
    total=10,
    learning_rate=1e-3,
    switched_learning_rate=5e-3,
    data_seed=0,
)


def decay_names(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.ndim >= 2}


def by_name(groups) -> list[set[str]]:
    return [{name for name, _ in group["params"]} for group in groups]


def test_groups_cover_every_parameter_once(gpt2) -> None:
    for factorised in (False, True):
        if factorised:
            fastffn.convert(gpt2, LowRankConfig(rank=5))
        groups = by_name(parameter_groups(gpt2, STAGE, decay_names(gpt2), 0.1, True))
        assert sum(map(len, groups)) == len(set.union(*groups)) == len(list(gpt2.parameters()))
        inside = {n for n in decay_names(gpt2) if ".mlp." in n}
        assert groups[SWITCHED] == inside
        assert len(inside) == (8 if factorised else 4)
        assert groups[0] == decay_names(gpt2) - inside


def test_factors_decay_as_a_product_or_each(gpt2) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    for frobenius, expected in ((True, [0.1, 0.0, 0.0]), (False, [0.1, 0.0, 0.1])):
        groups = parameter_groups(gpt2, STAGE, decay_names(gpt2), 0.1, frobenius)
        assert [group["weight_decay"] for group in groups] == expected
        assert [group["lr"] for group in groups] == [1e-3, 1e-3, 5e-3]
    fastffn.merge(gpt2)
    assert parameter_groups(gpt2, STAGE, decay_names(gpt2), 0.1, True)[SWITCHED]["weight_decay"] == 0.1


def test_rewarming_ramps_up_to_the_schedule() -> None:
    factors = [rewarmed(lambda step: 0.5, 10, 4, step) for step in range(10, 16)]
    assert factors == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert rewarmed(lambda step: 0.5, 10, 0, 10) == 0.5


def trainer_for(model, rows, tmp_path, stage=STAGE, frobenius=True, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": stage.total,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 3, "decay_type": "linear"},
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    return StageTrainer(
        stage=stage,
        clock=Clock(0.0, None),
        frobenius=frobenius,
        model=model,
        args=TrainingArguments(**(settings | changes)),
        train_dataset=rows,
        eval_dataset=rows[:2],
    )


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (24, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def test_a_stage_ends_where_it_should_while_the_schedule_spans_the_run(gpt2, rows, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    trainer = trainer_for(gpt2, rows, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 4
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.0, 0.5e-3, 1e-3, 1e-3])
    assert (tmp_path / "checkpoint-4").is_dir()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [2, 4]
    seconds = [e["train_seconds"] for e in trainer.state.log_history]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 0


def test_frobenius_decay_is_applied_before_the_step(gpt2, rows, tmp_path) -> None:
    """Against a hand-made step: decay of the product from the old values, then Adam on the same gradient."""
    import copy

    fastffn.convert(gpt2, LowRankConfig(rank=5))
    stage = dataclasses.replace(STAGE, end=1, total=1)
    args = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0, "max_grad_norm": 0.0}
    results = {}
    for decay in (0.0, 0.1):
        model = copy.deepcopy(gpt2)
        trainer_for(model, rows, tmp_path / str(decay), stage, weight_decay=decay, **args).train()
        results[decay] = model.transformer.h[0].mlp.up
    decayed = copy.deepcopy(gpt2.transformer.h[0].mlp)
    decayed.decay_product_(5e-3 * 0.1)
    for factor in ("a", "b"):
        before = getattr(gpt2.transformer.h[0].mlp.up, factor).weight
        step = getattr(results[0.0], factor).weight - before
        expected = getattr(decayed.up, factor).weight + step
        got = getattr(results[0.1], factor).weight
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert not torch.equal(getattr(decayed.up, factor).weight, before)


def test_nan_stops_before_the_weights(gpt2, rows, tmp_path) -> None:
    trainer = trainer_for(gpt2, rows, tmp_path)
    seen = {}

    def poison(module, args, kwargs, output):
        if trainer.state.global_step == 3 and module.training:
            seen["weights"] = {name: p.detach().clone() for name, p in gpt2.named_parameters()}
            output.loss = output.loss * float("nan")
        return output

    gpt2.register_forward_hook(poison, with_kwargs=True)
    with pytest.raises(TrainingDivergedError, match="nan in step 4 of stage 'stage1'") as caught:
        trainer.train()
    assert caught.value.exit_code not in (0, 2)
    for name, parameter in gpt2.named_parameters():
        assert torch.equal(parameter, seen["weights"][name])
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-4").exists()


def test_infinite_gradients_are_not_saved(gpt2, rows, tmp_path) -> None:
    """The loss is still a number, the weights are not any more."""
    trainer = trainer_for(gpt2, rows, tmp_path, max_grad_norm=0.0, eval_strategy="no", save_steps=1)
    weight = gpt2.transformer.ln_f.weight
    weight.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 1 else grad)
    with pytest.raises(TrainingDivergedError, match="Weights are infinite or not numbers after step 2"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_skipped_steps_do_not_decay(gpt2, rows, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    trainer = trainer_for(gpt2, rows, tmp_path)
    optimizer = trainer.create_optimizer()
    before = gpt2.transformer.h[0].mlp.up.a.weight.detach().clone()
    for found, changes in ((1.0, False), (0.0, True)):
        # What the loss scaling of fp16 tells a fused optimizer.
        optimizer.found_inf = torch.tensor(found)
        trainer._decay_products(optimizer, (), {})
        assert torch.equal(gpt2.transformer.h[0].mlp.up.a.weight, before) is not changes


def test_the_clock_leaves_validation_and_checkpoints_out(gpt2, rows, tmp_path, monkeypatch) -> None:
    def slow(method):
        def call(*args, **kwargs):
            time.sleep(0.5)
            return method(*args, **kwargs)

        return call

    trainer = trainer_for(gpt2, rows, tmp_path)
    monkeypatch.setattr(trainer, "evaluate", slow(trainer.evaluate))
    monkeypatch.setattr(trainer, "save_model", slow(trainer.save_model))
    start = time.perf_counter()
    trainer.train()
    # Two validations and two checkpoints sleep two seconds in all.
    assert time.perf_counter() - start - trainer.clock.seconds > 1.9
