"""What a run shows while it goes on."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from fastffn.train import pretrain as module
from fastffn.train import watch
from fastffn.train.gain import Gain
from fastffn.train.plan import plan_stages
from fastffn.train.pretrain import pretrain
from fastffn.train.watch import Forecast, Watch, in_words
from tests.train.test_pretrain import tiny

GAIN = Gain(
    dense_seconds=2.0,
    factorised_seconds=1.0,
    batch=1,
    bound=2.0,
    free_ffn_bound=3.0,
    saving=0.1,
    tokens_per_parameter=1.0,
)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (7140, "119 min"), (12000, "3 h 20 min"), (190800, "2 d 5 h")],
)
def test_durations(seconds, words) -> None:
    assert in_words(seconds) == words


def test_the_forecast_knows_what_each_sort_of_step_costs(text_file) -> None:
    stages = plan_stages(tiny(text_file), 20)
    forecast = Forecast(stages, GAIN)
    # Dense: 5 steps left at 4 s; then 12 factorised at half of that, then 8 dense ones.
    assert forecast.seconds_left(stages["dense"], 15, 4.0) == 5 * 4 + 12 * 2 + 8 * 4
    # At 1 s a factorised step, a dense one takes 2.
    assert forecast.seconds_left(stages["stage1"], 12, 1.0) == 8 * 2
    assert forecast.seconds_left(stages["stage2"], 20, 1.0) == 0
    alone = plan_stages(tiny(text_file, ffn="dense", rank=None), 20)
    assert Forecast(alone, None).seconds_left(alone["dense"], 5, 3.0) == 45


class Time:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_a_line_a_minute_and_a_report_at_most_as_often(text_file, monkeypatch, capsys) -> None:
    time, reports = Time(), []
    monkeypatch.setattr(watch, "time", time)
    stages = plan_stages(tiny(text_file), 20)
    shown = Watch(stages["dense"], 1000, Forecast(stages, GAIN), lambda *told: reports.append(told))
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[{"step": 1}])
    shown.on_train_begin(None, state, None)
    for step in range(1, 21):
        time.now += 25.0
        state.global_step = step
        if step == 5:
            shown.on_log(None, state, None, logs={"loss": 4.5, "learning_rate": 1e-3})
            shown.on_log(None, state, None, logs={"eval_loss": 4.25})
        shown.on_step_end(None, state, None)
        if step % 2 == 0:
            shown.on_evaluate(None, state, None)
    shown.on_train_end(None, state, None)
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"step (\d+)/20", line)[1] for line in lines] == ["3", "6", "9", "12", "15", "18", "20"]
    assert lines[0] == "dense  step 3/20  40 tokens/s  about 13 min left"
    assert lines[1].startswith("dense  step 6/20  loss 4.5000  validation 4.2500  rate 1.00e-03  40 tokens/s  about ")
    # Every second minute's validation, since those between come before a minute has passed; and the last.
    assert [told[0].split(";")[0] for told in reports] == [f"dense: step {n} of 20" for n in (4, 8, 12, 16, 20)]
    assert reports[0][1] == [{"step": 1}]
    assert re.search(r"about \d+ min left of the whole run\.$", reports[0][0])


def test_other_processes_are_silent(text_file, monkeypatch, capsys) -> None:
    stages = plan_stages(tiny(text_file), 20)
    shown = Watch(stages["dense"], 1000, Forecast(stages, GAIN), lambda *told: pytest.fail("a report"))
    state = SimpleNamespace(global_step=20, is_world_process_zero=False, log_history=[])
    monkeypatch.setattr(watch, "LINE_SECONDS", 0.0)
    shown.on_train_begin(None, state, None)
    shown.on_step_end(None, state, None)
    shown.on_evaluate(None, state, None)
    shown.on_train_end(None, state, None)
    assert capsys.readouterr().out == ""


def test_the_report_is_there_while_the_run_goes_on(text_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(watch, "LINE_SECONDS", 0.0)
    seen = {}
    write = module.write_progress

    def read_after(output, results, state):
        write(output, results, state)
        seen[state.split(";")[0]] = (output / "report.md").read_text()

    monkeypatch.setattr(module, "write_progress", read_after)
    results = pretrain(tiny(text_file), tmp_path / "run")
    assert set(seen) == {
        f"{name}: step {step} of {end}"
        for name, end, steps in (
            ("dense", 20, range(4, 21, 4)),
            ("stage1", 12, range(4, 13, 4)),
            ("stage2", 20, (16, 20)),
        )
        for step in steps
    }
    text = seen["stage1: step 8 of 12"]
    assert "**The run goes on**" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert rows["stage1"].split("|")[2].strip() == "8"
    assert rows["dense"].split("|")[6].strip() == f"{results['stages']['dense']['validation_loss']:.4f}"
    assert "two-stage in all" not in rows
    final = (tmp_path / "run" / "report.md").read_text()
    assert "goes on" not in final
    assert "Waiting for text took" in final


def test_the_share_of_waiting_is_measured(text_file, tmp_path, monkeypatch) -> None:
    import time

    from fastffn.data import blocks

    collate = blocks.collate

    def slow(rows):
        time.sleep(0.05)
        return collate(rows)

    monkeypatch.setattr(module, "collate", slow)
    slowed = pretrain(tiny(text_file, ffn="dense", rank=None), tmp_path / "slow")["stages"]["dense"]
    # Twenty batches, waited for 0.05 s each.
    assert slowed["waiting_share"] * slowed["own_seconds"] >= 20 * 0.05
    assert 0.5 < slowed["waiting_share"] < 1
