"""The report of a conversion."""

from __future__ import annotations

import json

import pytest
import torch

import fastffn
from fastffn import DenseConfig, LowRankConfig, MoEConfig, NeuronTreeConfig
from fastffn.convert import report as module
from fastffn.convert.report import LayerReport, cost, measure_speed
from fastffn.registry import get_kind
from tests.convert.models import KINDS, D, H, config_of, make


def test_costs() -> None:
    dense = cost(DenseConfig(d_model=D, d_hidden=H))
    assert dense == (2 * D * H + H + D, 2 * D * H, 4 * D * H)
    gated = cost(DenseConfig(d_model=D, d_hidden=H, gated=True, bias=False))
    assert gated == (3 * D * H, 3 * D * H, 6 * D * H)
    assert cost(LowRankConfig(d_model=D, d_hidden=H, rank=3, bias=False)).active == 2 * 3 * (D + H)
    # Of a tree the neurons on one path, of experts the chosen ones and the router.
    assert cost(NeuronTreeConfig(d_model=D, depth=3, trees=2)).active == 2 * 4 * 2 * D
    assert cost(MoEConfig(d_model=D, experts=4, expert_width=9, active=2)).active == 4 * D + 2 * 2 * 9 * D


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama-tied"])
def test_counts_are_those_of_the_model(name) -> None:
    model = make(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    report = fastffn.convert(model, LowRankConfig(rank=4), filter="*.1.*")
    saved = sum(layer.parameters_before - layer.parameters_after for layer in report.layers)
    assert saved > 0
    assert sum(parameter.numel() for parameter in model.parameters()) == before - saved
    left, changed = report.layers
    assert (left.reason, changed.reason) == ("not selected", None)
    assert left.before == left.after != changed.after
    values = json.loads(json.dumps(report.to_dict()))
    assert values["layers"][0]["reason"] == "not selected" and "config" not in values["layers"][0]
    assert values["layers"][1]["config"]["rank"] == 4
    assert values["all"]["flops_after"] == left.after.flops + changed.after.flops
    assert values["all"]["active_before"] == 2 * left.before.active
    text = str(report).splitlines()
    assert len(text) == 3
    assert text[0] == f"{left.path}: left as it was (not selected), {left.parameters_before:,} parameters"
    assert text[1].startswith(
        f"{changed.path}: low_rank, {changed.parameters_before:,} -> {changed.parameters_after:,}"
    )
    assert text[2].startswith("all FFNs: ")


def test_speeds(monkeypatch) -> None:
    timed = []
    speed = module.measure_speed

    def counted(dense, ffn, tokens):
        timed.append((dense, ffn, tokens))
        return speed(dense, ffn, tokens)

    monkeypatch.setattr(module, "measure_speed", counted)
    model = make("llama-tied").to(torch.bfloat16).train()
    report = fastffn.convert(model, LowRankConfig(rank=4))
    measured = report.measured(model, tokens=(1, 7))
    # Both layers are the same: timed once.
    assert [tokens for _, _, tokens in timed] == [1, 7]
    assert all(not layer.speeds for layer in report.layers)
    assert [[s.tokens for s in layer.speeds] for layer in measured.layers] == [[1, 7], [1, 7]]
    assert all(s.before > 0 and s.after > 0 for layer in measured.layers for s in layer.speeds)
    assert "x as fast" in str(measured)
    stored = measured.to_dict()["layers"][0]["speeds"][1]
    assert stored["ratio"] == pytest.approx(stored["before"] / stored["after"])
    assert all(part.training for part in model.modules())


def test_layers_that_were_left_are_not_timed(monkeypatch) -> None:
    model = make("gpt2")
    report = fastffn.convert(model, LowRankConfig(rank=4), filter="*.1.mlp")
    monkeypatch.setattr(module, "alternate", lambda calls, **_: {name: _Timing(call) for name, call in calls.items()})
    measured = report.measured(model, tokens=(2,))
    assert [len(layer.speeds) for layer in measured.layers] == [0, 1]


class _Timing:
    def __init__(self, call) -> None:
        assert call().shape == (2, D)
        self.median = 1.0


def test_a_layer_that_was_left() -> None:
    layer = LayerReport("here", DenseConfig(d_model=D), None, "not selected")
    assert (layer.kind, layer.parameters_after) == ("left as it was", layer.parameters_before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_timed(kind: str) -> None:
    dense = DenseConfig(d_model=24, d_hidden=36).resolved()
    ffn = get_kind(kind).module(config_of(kind).fitted_to(dense)).to(torch.bfloat16)
    speed = measure_speed(dense, ffn, 3)
    assert speed.before > 0 and speed.after > 0 and ffn.training
