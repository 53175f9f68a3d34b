from __future__ import annotations

import json

import pytest

from fastffn.train.report import time_to_loss, verdicts, write_report


def stage(seconds: float, losses: list[float], begin: float = 0.0) -> dict:
    count = len(losses)
    curve = [
        {"step": i + 1, "seconds": begin + (i + 1) * (seconds - begin) / count, "loss": loss}
        for i, loss in enumerate(losses)
    ]
    return {
        "steps": count,
        "tokens": 10 * count,
        "seconds": seconds,
        "own_seconds": seconds - begin,
        "validation_loss": losses[-1],
        "curve": curve,
    }


@pytest.fixture
def results() -> dict:
    return {
        "config": {
            "layers": 2,
            "d_model": 8,
            "sequence": 4,
            "batch": 2,
            "ffn": "low_rank",
            "rank": 2,
            "start": None,
            "learning_rate": 0.1,
            "dense_learning_rate": None,
            "baseline": True,
            "seed": 0,
            "data": "text",
            "init_from": None,
        },
        "ffn": ["rank", "start"],
        "processes": 1,
        "machine": {
            "processor": "P",
            "cpu_capability": "X",
            "threads": 1,
            "accelerator": None,
            "python": "3",
            "versions": {"torch": "2"},
            "commit": None,
        },
        "text": {"characters": 1, "train_tokens": 2, "validation_tokens": 3, "vocabulary": 4},
        "gain": {
            "dense_seconds": 1.0,
            "factorised_seconds": 0.5,
            "batch": 1,
            "bound": 2.0,
            "free_ffn_bound": 3.0,
            "saving": 0.1,
            "ratio": 2.0,
        },
        "stages": {
            "dense": stage(10.0, [5.0, 4.0]),
            "stage1": stage(3.0, [5.0, 3.5]),
            "merge": {"seconds": 1.0},
            "stage2": stage(8.0, [4.5, 4.0, 3.9, 3.8], begin=4.0),
        },
        "sample": {"prompt": "once", "continuation": "upon"},
    }


def test_time_to_loss_is_counted_in_the_dense_stage(results) -> None:
    # Stage 1 is at 3.5 earlier, but what it has is not the dense model.
    found = time_to_loss(results["stages"], "dense")
    assert found == {"target": 4.0, "seconds": 6.0, "dense_seconds": 10.0, "ratio": 0.6}
    assert time_to_loss(results["stages"], "dense_equal_tokens") is None


def test_not_reached_is_an_answer(results, tmp_path) -> None:
    results["stages"]["dense"] = stage(10.0, [5.0, 3.0])
    write_report(tmp_path, results)
    assert results["time_to_loss"]["dense"]["ratio"] is None
    assert "not reached; the two-stage run ends at 3.8000 after 8.0 s against 10.0 s" in verdicts(results)[0]


def test_it_names_every_learning_rate(results, tmp_path) -> None:
    def said(**changes) -> str:
        write_report(tmp_path, results | {"config": results["config"] | changes})
        return (tmp_path / "report.md").read_text()

    assert "rank 2, peak learning rate 0.1, dense run 0.1; seed" in said()
    rates = {"factor_learning_rate": 0.2, "dense_learning_rate": 0.3, "ffn_learning_rate": 0.4}
    assert "rate 0.1, factors 0.2, dense run 0.3, dense and merged FFNs 0.4; seed" in said(**rates)
    both = "dense run 0.3, first 1 FFNs dense, other dense and merged FFNs 0.4; seed"
    assert both in said(**rates, dense_layers=1)
    assert "rate 0.1, factors 0.2, dense and merged FFNs 0.4; seed" in said(**rates, baseline=False)
    assert "; peak learning rate 0.1, dense and merged FFNs 0.4; seed" in said(ffn="dense", ffn_learning_rate=0.4)


def test_files(results, tmp_path) -> None:
    write_report(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text())["time_to_loss"]["dense"]["ratio"] == 0.6
    text = (tmp_path / "report.md").read_text()
    assert "a ratio of 0.60" in text
    assert "two-stage in all" in text
    assert (tmp_path / "loss_vs_time.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss_vs_time.png", "report.md", "results.json"]
