"""Time to loss, small: the protocol does what it says, and goes on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import lzma

import pytest

from fastffn.errors import ConfigError, OutputError
from fastffn.evaluate.perplexity import evaluate_perplexity
from fastffn.experiments import run_cost
from fastffn.experiments import time_to_loss as module
from fastffn.experiments.recipes import CONTENDERS
from fastffn.experiments.run_cost import Price
from fastffn.experiments.time_to_loss import time_to_loss
from fastffn.experiments.time_to_loss_figures import compared, screened, tuned_dense
from fastffn.experiments.time_to_loss_report import confirmed_table, report, screen_table, verdicts
from tests.experiments.test_tree_ladder import small

NAMES = ("warm-10",)
GRID = {"names": NAMES, "rates": (4e-3, 1e-3), "lengths": (0.5,), "seeds": 1, "confirm": 1}


def tiny(text_file, **changes):
    return small(text_file, steps=12, seed=3, **changes)


def test_models_of_masked_tokens_have_no_perplexity_of_text(text_file, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("FASTFFN_DATA_DIR", raising=False)  # WikiText-2 is not asked for
    config = tiny(text_file, architecture="bert")
    output = tmp_path / "runs"
    result = time_to_loss(config, output, names=("narrow",), rates=(4e-3,), lengths=(0.5,), seeds=1, timing=False)
    assert result["confirmed"]["dense"]["word_perplexity"] == [None]
    table = (output / "table.md").read_text()
    assert "BERT of " in table
    ends = [line.split("|")[-2].strip() for line in table.splitlines() if line.startswith(("| dense ", "| narrow "))]
    assert ends[-3:] == ["", "", ""]  # one dense row and two of the recipe
    assert result["screen"]["narrow"]["flops"] < result["screen"]["dense"]["flops"]


def test_smaller_models_are_trained_for_as_many_flops(text_file, tmp_path) -> None:
    config, output = tiny(text_file), tmp_path / "runs"
    chosen = {"names": ("half-stays-2x",), "rates": (4e-3,), "lengths": (0.5,), "seeds": 0, "timing": False}
    screen = time_to_loss(config, output, **chosen)["screen"]
    steps = {
        name: sorted(cell["steps"] for cell in cells(output).values() if cell["recipe"] == name) for name in screen
    }
    assert steps["dense"] == [6, 12]
    assert steps["half-stays-2x"][:2] == [6, 12] and len(steps["half-stays-2x"]) == 3
    full = screen["dense"]["flops"]
    longest, _ = screen["half-stays-2x"]["frontier"][-1]
    a_step = screen["half-stays-2x"]["flops"] / 12
    assert abs(longest - full) <= a_step / 2
    assert all({"ratio", "beyond"} == set(row["any_width"]) for row in screen.values())
    assert "the model is too large for this budget" in (output / "table.md").read_text()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "wikitext-2"
    folder.mkdir()
    lines = "".join(f" the machine {n} forgets a river . \n" for n in range(20))
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress(lines.encode()))
    return folder.parent


@pytest.fixture(scope="module")
def made(text_file, words, tmp_path_factory):
    output = tmp_path_factory.mktemp("time-to-loss") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTFFN_DATA_DIR", str(words))
        patch.setattr(run_cost, "ROUNDS", 2)
        return output, time_to_loss(tiny(text_file), output, **GRID)


def cells(output) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (output / "cells").glob("*.json")}


def test_the_same_runs_on_both_sides(made) -> None:
    output, result = made
    runs = {name: cell for name, cell in cells(output).items() if "stages" in cell}
    swept = {f"{name}-12-{rate}-seed-3" for name in ("dense", *NAMES) for rate in ("0.001", "0.004")}
    dense = result["dense"]
    best = next(iter(result["confirmed"]["recipes"]))
    rate, dense_rate = (f"{result['screen'][name]['rate']:g}" for name in (best, dense))
    shorter = {f"{dense}-6-{dense_rate}-seed-3"}
    paired = {f"{dense}-12-{dense_rate}-seed-4"}
    paired |= {f"{best}-{steps}-{rate}-seed-4" for steps in (6, 12)}
    assert set(runs) == swept | shorter | paired
    fields = [json.loads((output / "runs" / name / "results.json").read_text())["config"] for name in runs]
    for other in ("data", "validation", "batch", "sequence", "tokenizer", "clip", "precision", "warmup_steps"):
        assert len({str(config[other]) for config in fields}) == 1, other
    for name, cell in runs.items():
        config = json.loads((output / "runs" / name / "results.json").read_text())["config"]
        assert (config["seed"], config["steps"]) == (cell["seed"], cell["steps"])
        assert config["learning_rate"] == cell["rate"]


def test_everything_is_there(made) -> None:
    output, result = made
    assert json.loads((output / "result.json").read_text()) == result
    assert (output / "table.md").read_text() == report(result)
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["screen"]) == {"dense", *NAMES}
    assert set(result["step"]["steps"]) == {"dense", "warm-10"}
    for name in ("dense", *NAMES):
        assert name in screen_table(result)
    assert len(verdicts(result)) == 2
    assert str(output) not in (output / "result.json").read_text()


def test_perplexity_is_that_of_the_last_stage(made, words, monkeypatch) -> None:
    output, result = made
    name, row = next(iter(result["confirmed"]["recipes"].items()))
    run = output / "runs" / f"{name}-12-{result['screen'][name]['rate']:g}-seed-4"
    score = evaluate_perplexity(run / "stage2", str(words / "wikitext-2" / "test.txt.xz"))
    assert row["lengths"][-1]["word_perplexity"][0] == score["word_perplexity"]


def test_seconds_are_steps_times_seconds_of_a_step(made) -> None:
    _, result = made
    name, row = next(iter(result["confirmed"]["recipes"].items()))
    price, dense = result["step"]["prices"][name], result["step"]["prices"][result["dense"]]
    # One step of warm-up, six factorised, five dense.
    spent = 6 * price["dense"] + 6 * price["factorised"] + price["start"] + price["merge"]
    assert row["lengths"][-1]["seconds_ratio"] == pytest.approx(spent / (12 * dense["dense"]))
    assert price["merge"] > 0 and price["start"] > 0


def test_the_same_call_goes_on(made, text_file, words, monkeypatch) -> None:
    output, result = made
    monkeypatch.setenv("FASTFFN_DATA_DIR", str(words))
    for name in ("pretrain", "evaluate_perplexity", "seconds_of"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("done again"))
    again = time_to_loss(tiny(text_file), output, **GRID)
    assert {n: v for n, v in again.items() if n != "machine"} == {n: v for n, v in result.items() if n != "machine"}
    alone = time_to_loss(tiny(text_file), output, **GRID | {"seeds": 0, "timing": False})
    assert (alone["confirmed"], alone["step"], alone["screen"]) == (None, None, result["screen"])
    assert "Other seeds" not in report(alone)
    with pytest.raises(OutputError, match="layers was 1, now 2"):
        time_to_loss(tiny(text_file, layers=2), output, **GRID)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("naif",)}, r"Unknown recipe 'naif'.*Did you mean 'naive'"),
        ({"rates": ()}, "at least one"),
        ({"lengths": (1.5,)}, "at most 1"),
        ({"seeds": -1}, "seeds is -1"),
        ({"confirm": 0}, "confirm 0"),
    ],
    ids=str,
)
def test_bad_input_leaves_nothing_behind(text_file, tmp_path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        time_to_loss(tiny(text_file), tmp_path / "runs", **GRID | changes)
    with pytest.raises(ConfigError, match="recipes choose"):
        time_to_loss(dataclasses.replace(tiny(text_file), ffn="low_rank"), tmp_path / "runs", **GRID)
    assert not (tmp_path / "runs").exists()


def test_contenders_are_recipes_of_every_sort(text_file) -> None:
    chosen = module._chosen(tiny(text_file), (), (1e-3,), (1.0,), 0, 1)
    assert {recipe.name for recipe in chosen} == set(CONTENDERS)
    assert any(recipe.smaller for recipe in chosen) and any(recipe.ffn == "narrow" for recipe in chosen)
    assert sum(recipe.dense for recipe in chosen) > 1
    assert [r.name for r in module._chosen(tiny(text_file), ("naive",), (1e-3,), (1.0,), 0, 1)] == ["dense", "naive"]


# -- figures, by hand -----------------------------------------------------------------------------------------------


def run(recipe: str, steps: int, loss: float, *, seed: int = 0, rate: float = 1e-3, words: float = 50.0) -> dict:
    """Half of a recipe's steps are factorised."""
    half = steps // 2
    two = [
        {"name": "stage1", "factorised": True, "begin": 0, "end": half, "curve": [[half, loss + 1]]},
        {"name": "stage2", "factorised": False, "begin": half, "end": steps, "curve": [[steps, loss]]},
    ]
    one = [{"name": "dense", "factorised": False, "begin": 0, "end": steps, "curve": [[half, loss + 1], [steps, loss]]}]
    facts = {"recipe": recipe, "steps": steps, "length": steps / 100, "rate": rate, "seed": seed, "loss": loss}
    stages = one if recipe.startswith("dense") else two
    return facts | {"stages": stages, "word_perplexity": words, "clock_seconds": float(steps)}


PRICES = {name: Price(10.0, 6.0, 0.0, 0.0) for name in ("dense", "dense-2", "good", "bad", "best")}
DENSE = [run("dense", 50, 5.0), run("dense", 100, 4.0)]


def test_a_recipe_against_dense_training_of_the_same_loss() -> None:
    sweep = {
        "dense": {"note": "", "dense": True, "runs": [run("dense", 100, 4.5, rate=2e-3), DENSE[1]]},
        "dense-2": {"note": "", "dense": True, "runs": [run("dense-2", 100, 4.1)]},
        "good": {"note": "", "dense": False, "runs": [run("good", 100, 4.0), run("good", 100, 4.2, rate=2e-3)]},
        "bad": {"note": "", "dense": False, "runs": [run("bad", 100, 5.5)]},
        "best": {"note": "", "dense": False, "runs": [run("best", 100, 3.9)]},
    }
    assert tuned_dense(sweep) == ("dense", 1e-3)
    rows = screened(sweep, DENSE, PRICES)
    # Half the steps at 6 instead of 10.
    assert (rows["good"]["flops_share"], rows["good"]["ratio"], rows["good"]["beyond"]) == (0.8, 0.8, "")
    assert (rows["good"]["rate"], rows["good"]["at_edge"]) == (1e-3, True)
    # As bad as less than half of a dense run: at least 0.8 / 0.5.
    assert (rows["bad"]["ratio"], rows["bad"]["beyond"]) == (pytest.approx(1.6), ">")
    assert (rows["best"]["ratio"], rows["best"]["beyond"]) == (0.8, "<")
    assert rows["dense"]["ratio"] == 1
    assert rows["dense"]["frontier"] == [[500, 5.0], [1000, 4.0]]


def test_against_models_that_stay_smaller() -> None:
    """At 1,000 the dense run is at 4.0; a smaller one, at 6 a step, is there at 480 and at 3.8 at 960."""
    prices = PRICES | {"dense-small": Price(6.0, 6.0, 0.0, 0.0)}
    small = [run("dense-small", 160, 3.8), run("dense-small", 80, 4.0), run("dense-small", 100, 3.9)]
    sweep = {
        "dense": {"note": "", "dense": True, "runs": [DENSE[1]]},
        "dense-small": {"note": "", "dense": False, "runs": [small[2]]},
        "good": {"note": "", "dense": False, "runs": [run("good", 100, 4.0)]},
        "bad": {"note": "", "dense": False, "runs": [run("bad", 100, 4.5)]},
        "best": {"note": "", "dense": False, "runs": [run("best", 100, 3.7)]},
    }
    rows = screened(sweep, DENSE, prices, [small])
    assert {name: (row["any_width"]["beyond"], row["any_width"]["ratio"]) for name, row in rows.items()} == {
        "dense": ("", pytest.approx(1000 / 480)),
        "dense-small": ("", 1.0),
        "good": ("", pytest.approx(800 / 480)),
        "bad": (">", pytest.approx(800 / 480)),
        "best": ("<", 0.8),
    }
    assert rows["good"]["ratio"] == 0.8  # against the same model
    assert rows["dense-small"]["frontier"] == [[480, 4.0], [600, 3.9], [960, 3.8]]
    table = screen_table({"screen": rows, "rates": [1e-3]})
    assert table.splitlines()[0].split("|")[-2].strip() == "any width"
    assert table.splitlines()[-2].split("|")[-2].strip() == "> 1.667"


def test_paired_seeds() -> None:
    paired = {
        "dense": [run("dense", 100, 4.0, seed=1), run("dense", 100, 4.2, seed=2)],
        "good": [
            run("good", 50, 4.4, seed=2),
            run("good", 50, 4.2, seed=1),
            run("good", 100, 3.8, seed=1),
            run("good", 100, 3.9, seed=2, words=40.0),
        ],
        "bad": [run("bad", 100, 4.1, seed=1), run("bad", 100, 4.1, seed=2)],
    }
    found = compared(paired, "dense", PRICES, None)
    good, bad = found["recipes"]["good"], found["recipes"]["bad"]
    assert good["flops"]["by_run"] == [0.8, 0.8]
    # Seed 1: half way between 0.4 and 0.8, in the logarithm; seed 2: two fifths of the way.
    assert good["flops"]["between"] == pytest.approx([0.4 * 2**0.5, 0.4 * 2**0.4])
    assert good["flops"]["by_run_mean"] == 0.8 and good["flops"]["by_run_sd"] == 0
    assert [part["length"] for part in good["lengths"]] == [0.5, 1.0]
    assert [part["difference"]["mean"] for part in good["lengths"]] == pytest.approx([0.2, -0.25])
    assert good["lengths"][1]["word_perplexity"] == [50.0, 40.0]
    assert good["lengths"][0]["clock_ratio"] == [0.5, 0.5]
    # Reached on one seed only: no mean.
    assert bad["flops"]["by_run"] == [None, 0.8] and bad["flops"]["by_run_mean"] is None
    result = {"dense": "dense", "confirmed": found}
    assert "bad, FLOPs: reaches the dense loss on 1 of 2 seeds; no ratio." in verdicts(result)
    assert "| good" in confirmed_table(result)


def test_a_price_in_seconds_of_its_own() -> None:
    paired = {"dense": [run("dense", 100, 4.0)], "good": [run("good", 100, 4.0)]}
    seconds = {"dense": Price(1.0, 1.0, 0.0, 0.0), "good": Price(1.0, 0.5, 0.0, 10.0)}
    found = compared(paired, "dense", PRICES, seconds)["recipes"]["good"]
    assert found["lengths"][0]["seconds_ratio"] == pytest.approx((25 + 10 + 50) / 100)
    assert found["seconds"]["by_run"] == pytest.approx([0.85])
    assert found["flops"]["by_run"] == [0.8]
