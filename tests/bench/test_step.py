from __future__ import annotations

import json

import pytest

from fastffn import LowRankConfig
from fastffn.bench import step as module
from fastffn.bench.step import bench_step, format_step
from fastffn.convert.fresh import ModelShape
from fastffn.errors import MeasurementError

SHAPE = ModelShape(layers=2, d_model=32, heads=2, sequence=16, vocabulary=50)


def test_measures_both_and_states_the_bound() -> None:
    result = bench_step(SHAPE, LowRankConfig(rank=4, d_model=32).resolved(), batch=3, rounds=3)
    assert result["batch"] == 3
    assert result["ratio"] == result["seconds"]["dense"]["median"] / result["seconds"]["factorised"]["median"]
    assert 1 < result["bound"] < result["free_ffn_bound"]
    assert result["peak_bytes"]["dense"] > 3 * 16 * 50 * 4  # the logits at least
    assert result["parameters"]["factorised"] < result["parameters"]["dense"]
    json.dumps(result)
    table = format_step(result)
    assert "arithmetic allows" in table
    assert "low_rank, rank 4" in table


def test_first_ffns_may_stay_dense() -> None:
    ffn = LowRankConfig(rank=4, d_model=32).resolved()
    whole, part = (bench_step(SHAPE, ffn, batch=1, rounds=1, dense_layers=layers) for layers in (0, 1))
    saved = [result["gflops"]["dense"] - result["gflops"]["factorised"] for result in (whole, part)]
    assert saved[1] == pytest.approx(saved[0] / 2)
    assert part["bound"] < whole["bound"]
    assert part["parameters"]["factorised"] > whole["parameters"]["factorised"]
    assert ", first 1 FFNs dense" in format_step(part) and "FFNs dense" not in format_step(whole)


def test_wrong_results_are_not_timed(monkeypatch) -> None:
    def break_it(model):
        right(model)
        model.transformer.h[0].mlp.c_fc.bias.data.add_(0.1)

    right = module.merge
    monkeypatch.setattr(module, "merge", break_it)
    monkeypatch.setattr(module, "compare_steps", lambda *a, **k: pytest.fail("timed all the same"))
    with pytest.raises(MeasurementError, match="merged against factorised"):
        bench_step(SHAPE, LowRankConfig(rank=4), batch=1, rounds=1)
