"""The search on tiny models; times are set by hand, so that results do not depend on the machine."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastffn.hf
from fastffn import DenseConfig, LowRankConfig, NarrowConfig
from fastffn.convert.budget import search
from fastffn.convert.budget.quality import Budget
from fastffn.convert.budget.search import convert_within
from fastffn.convert.match import fastffn_modules
from fastffn.convert.report import LayerSpeed, cost
from fastffn.errors import ConfigError, ConversionError, NothingPaysError
from tests.convert.models import make, tokens


def by_flops(dense: DenseConfig, module: Any, count: int) -> LayerSpeed:
    """As if time were arithmetic."""
    parameters = cost(module.config).parameters
    return LayerSpeed(count, dense.d_model * dense.d_hidden * (3 if dense.gated else 2) * 1e-6, parameters * 1e-6)


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "measure_speed", by_flops)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def held_out(model: Any) -> list[dict[str, torch.Tensor]]:
    """Text that a causal model finds likely: whatever becomes of it, it can only lose."""
    ids = tokens(6)[2:]
    if hasattr(model, "generate") and model.can_generate():
        ids = model.generate(ids[:, :2], max_new_tokens=14, min_new_tokens=14, do_sample=False)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def lively(name: str) -> Any:
    """A model whose FFNs matter."""
    model = make(name)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if any(part in own for part in ("mlp", "intermediate", "output.dense.weight")):
                parameter.mul_(3)
    return model


def within(model: Any, budget: Budget, **options: Any) -> Any:
    return convert_within(model, budget, calibration=[tokens(8)], held_out=held_out(model), **options)


def kinds_in(model: nn.Module) -> list[str]:
    return [type(module).__name__ for _, module in fastffn_modules(model)]


def budget_between(name: str) -> Budget:
    """One that the fastest plan breaks and others keep."""
    loose = Budget(max_loss_increase=50.0) if name != "bert" else Budget(min_similarity=1e-6)
    report = within(lively(name), loose)
    fastest = report.chosen
    if name == "bert":
        return Budget(min_similarity=1 - fastest.quality.damage / 3)
    return Budget(max_loss_increase=(fastest.quality.value / report.curve[0].quality.value - 1) / 3)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "bert"])
def test_the_fastest_that_keeps_the_budget(name: str, tmp_path: Path) -> None:
    budget = budget_between(name)
    model = lively(name)
    meter = budget.meter(copy.deepcopy(model), held_out(model))
    report = within(model, budget, tokens=8)
    assert fastffn_modules(model) and budget.allows(meter.dense, report.chosen.quality)
    # Measured again, on the model as it is now.
    meter.model = model
    assert meter.measure() == pytest.approx(report.chosen.quality, rel=1e-5, abs=1e-7)
    # What is faster was tried, and broke the budget.
    faster = [point for point in report.curve if point.plan.seconds < report.chosen.plan.seconds]
    assert faster and not any(budget.allows(meter.dense, point.quality) for point in faster)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    # The report is of what is there, and can be written.
    there = {path: module.config for path, module in fastffn_modules(model)}
    assert {layer.path: layer.config for layer in report.conversion.layers if layer.config is not None} == there
    report.save(tmp_path)
    stored = json.loads((tmp_path / "conversion.json").read_text())
    assert stored["chosen"] in stored["curve"] and (tmp_path / "tradeoff.png").stat().st_size > 1000
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(again(tokens())[0], model(tokens())[0])


def state(model: nn.Module) -> dict[str, Any]:
    return {name: type(module) for name, module in model.named_modules()} | {
        name: value.clone() for name, value in model.state_dict().items()
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value is other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_budget_that_nothing_keeps(name: str, tmp_path: Path) -> None:
    model = lively(name)
    before = state(model)
    budget = Budget(max_loss_increase=1e-9) if name == "gpt2" else Budget(min_similarity=1 - 1e-12)
    with pytest.raises(NothingPaysError, match=r"Nothing pays here: every change .* breaks the budget .*--force"):
        within(model, budget, kinds_to_try=["low_rank"])
    assert same(before, state(model)) and not hasattr(model.config, "quantization_config")
    assert not list(tmp_path.iterdir())
    report = within(model, budget, kinds_to_try=["low_rank"], force=True)
    assert report.chosen is report.curve[1] and report.chosen.plan.changed == 1
    assert kinds_in(model) == ["LowRankFFN"]
    reasons = [layer.reason for layer in report.conversion.layers if layer.config is None]
    assert reasons == ["stays dense: nothing pays"]


def test_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "measure_speed", lambda dense, module, count: LayerSpeed(count, 1.0, 1.0))
    model = make("gpt2")
    before = state(model)
    with pytest.raises(NothingPaysError, match=r"at 5 tokens a call no size of narrow, low_rank is 1.05 times"):
        within(model, Budget(max_loss_increase=1.0), tokens=5, kinds_to_try=["narrow", "low_rank"])
    # Of all kinds, those that have sizes.
    with pytest.raises(NothingPaysError, match="no size of int8, low_rank, narrow is"):
        within(model, Budget(max_loss_increase=1.0), tokens=5)
    assert same(before, state(model))


def test_kinds_and_layers_that_are_asked_for() -> None:
    model = make("gpt2")
    report = within(model, Budget(max_loss_increase=50.0), kinds_to_try=["narrow"], filter="transformer.h.1.mlp")
    assert kinds_in(model) == ["NarrowFFN"]
    assert "transformer.h.1.mlp: narrow" in str(report) and "times as fast together" in str(report)
    assert [layer.reason for layer in report.conversion.layers] == ["not selected", None]
    assert isinstance(report.conversion.layers[1].config, NarrowConfig)


def test_frozen_ffns_and_halves_stay_so() -> None:
    model = make("gpt2").to(torch.bfloat16).requires_grad_(False).train()
    within(model, Budget(max_loss_increase=50.0), kinds_to_try=["low_rank"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training and all(module.training for _, module in fastffn_modules(model))
    assert not any(p.requires_grad for p in model.parameters())


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens is 0"):
        within(make("gpt2"), Budget(max_loss_increase=1.0), tokens=0)
    model = make("gpt2")
    with pytest.raises(ConversionError, match="The calibration has 16 tokens"):
        convert_within(
            model, Budget(max_loss_increase=1.0), calibration=[tokens(1)], held_out=held_out(model)
        )  # fmt: skip
    fastffn.convert(model, LowRankConfig(rank=2))
    with pytest.raises(ConversionError, match="holds FastFFN modules already"):
        within(model, Budget(max_loss_increase=1.0))


def test_a_change_that_does_no_damage() -> None:
    """Staying dense is a choice all the same: it is what the others are compared with."""
    model = make("bert").eval()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.zero_()
    report = within(model, Budget(min_similarity=0.9999999), kinds_to_try=["narrow"])
    assert report.curve[0].plan.changed == 0
    assert [layer.path for layer in report.conversion.layers if layer.config is not None] == [
        "encoder.layer.1.intermediate"
    ]
    assert report.chosen.plan.changed == 1
