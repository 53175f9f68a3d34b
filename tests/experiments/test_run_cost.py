"""The cost of a run: by hand, and against what a run did."""

from __future__ import annotations

import pytest
import torch

from fastffn.convert.fresh import ModelShape, fresh_model
from fastffn.experiments.recipes import recipes
from fastffn.experiments.run_cost import Price, curve, flops_of, record_of, seconds_of
from fastffn.measure.flops import count_flops, step_flops
from fastffn.train.config import PretrainConfig, get_preset
from fastffn.train.pretrain import pretrain
from tests.experiments.test_tree_ladder import small

SHAPE = {"layers": 2, "d_model": 16, "heads": 2, "sequence": 16, "batch": 4}


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_makes_a_run_and_has_a_price(name) -> None:
    config = PretrainConfig.from_flat(get_preset("small") | {"layers": 2, "d_model": 32})
    recipe = recipes()[name]
    run = recipe.run(config, steps=100, rate=1e-3, seed=7)
    assert (run.seed, run.steps, run.learning_rate, run.baseline) == (7, 100, 1e-3, False)
    assert recipe.dense == (not run.two_stage and run.d_hidden is None)
    price = flops_of(run, 300)
    assert 0 < price.factorised <= price.dense
    assert (price.factorised == price.dense) == (not run.two_stage)
    # Neurons are woken by copying.
    assert (price.merge > 0) == (recipe.ffn in ("low_rank", "block"))
    assert run.factor_learning_rate == (None if recipe.factors_rate == 1 else 1e-3 * recipe.factors_rate)
    assert run.ffn_learning_rate == (None if recipe.ffn_rate == 1 else 1e-3 * recipe.ffn_rate)


def test_prices_by_hand() -> None:
    config = PretrainConfig.from_flat(get_preset("small") | SHAPE)
    run = recipes()["naive"].run(config, steps=10, rate=1e-3, seed=0)
    assert run.ffn_options == {"rank": 4}
    price = flops_of(run, 300)
    shape = ModelShape(layers=2, d_model=16, heads=2, sequence=16, vocabulary=300)
    with torch.device("meta"):
        assert price.dense == 4 * step_flops(fresh_model(shape), 16)
        assert price.factorised == 4 * step_flops(fresh_model(shape, run.ffn_config()), 16)
    # Two layers of two maps of 16 x 64.
    assert price.merge == 2 * 2 * (2 * 16 * 64 * 4)
    assert price.start == 2 * 2 * (6 * 64 * 16**2 + 20 * 16**3)
    first_dense = flops_of(recipes()["first-dense"].run(config, steps=10, rate=1e-3, seed=0), 300)
    assert (first_dense.merge, first_dense.start) == (price.merge / 2, price.start / 2)
    assert first_dense.factorised == (price.dense + price.factorised) / 2


def test_a_smaller_dense_model_has_its_own_price(tmp_path) -> None:
    config = PretrainConfig.from_flat(get_preset("small") | SHAPE)
    runs = {name: recipes()[name].run(config, steps=10, rate=1e-3, seed=0) for name in ("dense", "half-stays-2x")}
    assert runs["half-stays-2x"].d_hidden == 32
    prices = {name: flops_of(run, 300).dense for name, run in runs.items()}
    # Two layers of two maps, half of 64 neurons, forward and backward.
    assert prices["dense"] - prices["half-stays-2x"] == 4 * 16 * 2 * 2 * (16 * 32) * 2 * 3
    seconds = seconds_of(runs, 300, tmp_path)
    assert set(seconds["steps"]) == {"dense", "half-stays-2x"}
    assert seconds["prices"]["half-stays-2x"] != seconds["prices"]["dense"]


def test_decompositions_count() -> None:
    tensor = torch.randn(3, 8, 20)
    assert count_flops(lambda: torch.linalg.svd(tensor, full_matrices=False)) == 3 * (6 * 20 * 8**2 + 20 * 8**3)


def test_a_curve_over_cost_by_hand() -> None:
    price = Price(dense=10.0, factorised=6.0, start=3.0, merge=5.0)
    record = {
        "stages": [
            {"factorised": False, "begin": 0, "end": 2, "curve": [[2, 9.0]]},
            {"factorised": True, "begin": 2, "end": 6, "curve": [[4, 8.0], [6, 7.0]]},
            {"factorised": False, "begin": 6, "end": 8, "curve": [[7, 6.0], [8, 5.0]]},
        ]
    }
    # Warm-up 20, start 3, four factorised steps, merge 5, two dense steps.
    assert curve(record, price) == [(20, 9.0), (35, 8.0), (47, 7.0), (62, 6.0), (72, 5.0)]
    dense = {"stages": [{"factorised": False, "begin": 0, "end": 3, "curve": [[1, 2.0], [3, 1.0]]}]}
    assert curve(dense, price) == [(10, 2.0), (30, 1.0)]


def test_what_is_kept_of_a_run(text_file, tmp_path) -> None:
    run = recipes()["warm-10"].run(small(text_file), steps=20, rate=1e-3, seed=1)
    results = pretrain(run, tmp_path / "run")
    record = record_of(run, results)
    assert [(s["name"], s["factorised"], s["begin"], s["end"]) for s in record["stages"]] == [
        ("warmup", False, 0, 2),
        ("stage1", True, 2, 12),
        ("stage2", False, 12, 20),
    ]
    assert record["loss"] == record["stages"][-1]["curve"][-1][1] == results["stages"]["stage2"]["validation_loss"]
    assert record["clock_seconds"] == results["stages"]["stage2"]["seconds"]
    assert [stage["curve"][-1][0] for stage in record["stages"]] == [2, 12, 20]
    # Loading what a switch wrote is in the price of the switch.
    assert results["stages"]["stage1"]["loading_seconds"] > 0 < results["stages"]["stage2"]["loading_seconds"]
    assert results["stages"]["warmup"]["loading_seconds"] == 0
