"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastffn.cli.commands import COMMANDS, cli
from fastffn.errors import FastFFNError
from fastffn.ops import OPS
from fastffn.train.config import PRESETS

TINY = [
    *("--switch", "0.6"),
    *("--tokenizer", "train:300", "--layers", "1", "--d-model", "16", "--heads", "2", "--sequence", "16"),
    *("--rank", "4", "--steps", "10", "--warmup-steps", "2", "--rewarm-steps", "2"),
    *("--evaluate-every", "5", "--checkpoint-every", "5", "--log-every", "5"),
]


def run(
    *arguments: object, timeout: int = 240, code: str = "from fastffn.cli import main; main()"
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def refused(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    flat = " ".join(done.stderr.split())
    for word in words:
        assert word in flat, flat


@pytest.mark.parametrize(
    "command",
    [
        [],
        *[[name] for name in COMMANDS],
        ["evaluate", "perplexity"],
        ["evaluate", "harness"],
        ["bench", "step"],
        ["bench", "layer"],
        ["experiment", "fff-table-1"],
        ["experiment", "tree-ladder"],
        ["experiment", "time-to-loss"],
    ],
    ids=str,
)
def test_help_has_an_example(command) -> None:
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example: fastffn" in result.output


@pytest.fixture(scope="module")
def model(text_file, tmp_path_factory) -> Path:
    """The directory of a small run, made by the command."""
    output = tmp_path_factory.mktemp("run") / "run"
    done = run("pretrain", "--data", text_file, *TINY, "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    # Elsewhere than on a terminal there are no progress bars, and no chatter of libraries.
    assert "%|" not in done.stderr
    assert "[transformers]" not in done.stderr
    assert any(line.startswith("stage1  step 6/6") for line in done.stderr.splitlines())
    assert results["stages"]["stage2"]["steps"] == 4
    return output


def test_pretrain_says_what_it_found(model) -> None:
    done = run("pretrain", "--config", model / "config.yaml", "--output", model)
    assert done.returncode == 0, done.stderr
    assert "holds this run already, complete" in done.stdout
    assert "Time to the final loss of the dense run" in done.stdout
    assert "validation loss" in done.stdout


def test_merge(model, tmp_path) -> None:
    done = run("merge", model / "stage1", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["layers"] == ["transformer.h.0.mlp"]
    assert result["largest_difference"] < 1e-4
    refused(run("merge", model / "stage1", tmp_path / "out"), "exists already")
    refused(run("merge", model / "stage2", tmp_path / "no"), "no factors to merge")
    refused(run("merge", tmp_path / "nothing", tmp_path / "no"), "not a directory")
    assert not (tmp_path / "no").exists()
    words = run("merge", model / "stage1", tmp_path / "again", "--no-check").stdout
    assert "1 FFNs merged" in words
    assert "Logits" not in words


def test_evaluate_perplexity(model, text_file, tmp_path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:2000])
    text_file = short
    done = run("evaluate", "perplexity", model / "stage1", "--data", text_file, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert 1 < result["token_perplexity"] < 300
    assert (result["context"], result["stride"]) == (16, 8)
    table = run("evaluate", "perplexity", model / "merged", "--data", text_file)
    assert "bits per byte" in table.stdout
    refused(run("evaluate", "perplexity", model / "stage1", "--data", tmp_path / "no.txt"), "does not exist")
    refused(run("evaluate", "perplexity", tmp_path, "--data", text_file), "config.json is missing")
    refused(run("evaluate", "perplexity", model / "stage2", "--data", text_file, "--stride", 0), "stride is 0")
    refused(run("evaluate", "perplexity", model / "stage2", "--data", text_file, "--context", 99), "context is 99")


def test_distill(model, text_file, tmp_path) -> None:
    pair, output = (model / "stage1", model / "stage2"), tmp_path / "out"
    options = ("--data", text_file, "--sequence", 16, "--batch", 4, "--layer-steps", 2, "--validation-blocks", 8)
    stopped = run("distill", *pair, *options, "--steps", 2, "--output", output, "--max-minutes", 1e-9)
    assert stopped.returncode == 0, stopped.stderr
    assert "the same command goes on" in stopped.stdout
    done = run("distill", *pair, *options, "--steps", 2, "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["complete"] and result["stages"]["student"]["steps"] == 2
    assert "KL to teacher" in done.stderr and "%|" not in done.stderr
    refused(run("distill", *pair, *options, "--steps", 3, "--output", output), "steps: 2 there, 3 here")
    refused(run("distill", *pair[::-1], *options, "--output", tmp_path / "no"), "holds no FastFFN kinds")
    refused(run("distill", *pair, *options), "--output is missing")
    refused(run("distill", *pair, "--output", tmp_path / "no"), "data is missing")
    refused(run("distill", output, pair[1], *options, "--output", tmp_path / "no"), f"Did you mean {output}/student")
    assert not (tmp_path / "no").exists()


def test_bench_step() -> None:
    done = run("bench", "step", "--rounds", 2, "--batch", 1, "--rank", 16, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ffn"]["rank"] == 16
    assert result["ratio"] > 0
    refused(run("bench", "step", "--rounds", 0), "--rounds is 0")
    refused(run("bench", "step", "--preset", "small"), "name another kind, such as --ffn low_rank")
    refused(run("bench", "step", "--preset", "sed"), "Did you mean 'seed'")


LAYER = ["bench", "layer", "--d-model", "8", "--depth", "2", "--tokens", "2,5", "--rounds", "1", "--max-seconds", "0.1"]


def test_bench_layer(tmp_path) -> None:
    output, plot = tmp_path / "new" / "layer.json", tmp_path / "layer.png"
    done = run(*LAYER, "--trees", 2, "--no-compile", "--threads", 1, "--output", output, "--plot", plot, "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    result = json.loads(done.stdout)
    assert json.loads(output.read_text()) == result
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (result["ffn"]["trees"], result["total_width"], result["machine"]["threads"]) == (2, 14, 1)
    assert {row["tokens"] for row in result["rows"]} == {2, 5}
    assert "5 tokens, forward + backward: " in done.stderr
    assert [path.name for path in output.parent.iterdir()] == ["layer.json"]
    refused(run(*LAYER, "--plot", tmp_path / "plot.txt"), "plot.txt; the plot is a PNG file")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ffn", "neuron_trees"], "Did you mean 'neuron_tree'"),
        (["--tokens", "0,4"], "tokens is '0,4'; it must be whole numbers of at least 1"),
        (["--tokens", "-4"], "tokens is '-4'"),
        (["--tokens", "4;8"], "tokens is '4;8'; it must be whole numbers with commas, such as 1,64,4096"),
        (["--threads", "0"], "threads is 0; it must be at least 1"),
        (["--layers", "-1"], "layers is -1"),
        (["--d-model", "0"], "d_model is 0"),
        (["--device", "warp"], "device is 'warp', which cannot be used here"),
        (["--backend", "dens"], "no backend 'dens'"),
        (["--backend", "torch_grouped", "--depth", "0"], "needs a tree of at least two levels"),
        (["--rank", "3"], "NeuronTreeConfig has no field 'rank'"),
        (["--dtype", "fp8"], "fp8"),
        (["--output", "setup.cfg/layer.json"], "cannot be created"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_layer_refuses(options, words, tmp_path, monkeypatch) -> None:
    from fastffn.bench.layer import run as layer

    monkeypatch.setattr(layer, "measure_limits", lambda *_: pytest.fail("measured all the same"))
    (tmp_path / "setup.cfg").touch()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, [*LAYER, *options])
    error = result.exception
    assert (error.exit_code if isinstance(error, FastFFNError) else result.exit_code) == 2, error
    assert words in (str(error) if isinstance(error, FastFFNError) else result.output)


def test_info() -> None:
    result = json.loads(CliRunner().invoke(cli, ["info", "--json"]).output)
    assert set(result["kinds"]) >= {"dense", "low_rank"}
    assert "FASTFFN_DATA_DIR" in result["environment"]
    backends = result["operations"]["neuron_tree"]["backends"]
    assert list(backends) == [impl.name for impl in OPS["neuron_tree"].impls]
    assert backends["torch_grouped"] is None and "faster" in backends["dense"]
    shown = CliRunner().invoke(cli, ["info"]).output
    assert "low_rank" in shown and "512 tokens through 1x11" in shown


@pytest.mark.parametrize("preset", PRESETS)
def test_print_config_is_a_config(preset, tmp_path) -> None:
    first = CliRunner().invoke(cli, ["pretrain", "--preset", preset, "--print-config"])
    assert first.exit_code == 0, first.output
    path = tmp_path / "config.yaml"
    path.write_text(first.output)
    second = CliRunner().invoke(cli, ["pretrain", "--config", str(path), "--print-config"])
    assert second.output == first.output


BAD = [
    (["--layerz", "3"], "Did you mean one of: '--dense-layers', '--layers'"),
    (["--rank", "0"], "rank is 0"),
    (["--rank", "-2"], "rank is -2"),
    (["--rank", "17"], "min(in, out) = 16"),
    (["--rank", "many"], "'many' is not a valid integer"),
    (["--heads", "3"], "does not divide d_model 16"),
    (["--data", "/nowhere/text.txt"], "does not exist"),
    (["--data", "{empty}"], "is empty"),
    (["--data", "{short}"], "shorter than one block"),
    (["--data", "{binary}"], "not UTF-8 text"),
    (["--tokenizer", "{folder}"], "No tokenizer could be loaded"),
    (["--vocabulary", "301"], "has 300 tokens, but vocabulary is 301"),
    (["--preset", "dmo"], "Did you mean 'demo'"),
    (["--config", "{missing}"], "does not exist"),
    (["--config", "{unknown}"], "Did you mean 'learning_rate'"),
    (["--config", "{wrong}"], "layers is 'four'"),
    (["--config", "{binary}"], "cannot be read as YAML"),
    (["--schedule", "linear"], "'linear' is not one of"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_paragraph_and_code_2(text_file, tmp_path, flags, words) -> None:
    files = {
        "empty": b"",
        "short": b"a b c d e f g h i j\n",
        "binary": bytes(range(128, 256)) * 9,
        "unknown": b"learnin_rate: 1\n",
        "wrong": b"layers: four\n",
    }
    paths = {"missing": tmp_path / "missing", "folder": tmp_path}
    for name, content in files.items():
        paths[name] = tmp_path / f"{name}.txt"
        paths[name].write_bytes(content)
    filled = [flag.format(**paths) for flag in flags]
    data = [] if "--data" in flags else ["--data", text_file]
    refused(run("pretrain", *TINY, *data, "--output", tmp_path / "run", *filled), words)
    # What was wrong with the call leaves no half of a run that would stand in the way of the right call.
    again = tmp_path / "run"
    assert not (again / "dense").exists()


def test_after_bad_data_the_right_call_works_in_the_same_directory(text_file, tmp_path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b c d e f\n")
    refused(run("pretrain", *TINY, "--data", short, "--output", tmp_path / "run"), "shorter than one block")
    done = run("pretrain", *TINY, "--data", text_file, "--output", tmp_path / "run", "--no-baseline")
    assert done.returncode == 0, done.stderr


def test_an_output_that_cannot_be_made(model, text_file, tmp_path) -> None:
    (tmp_path / "file").touch()
    refused(run("pretrain", *TINY, "--data", text_file, "--output", tmp_path / "file" / "run"), "cannot be created")
    refused(run("merge", model / "stage1", tmp_path / "file" / "out"), "cannot be created")


def test_interruption_says_how_to_go_on(monkeypatch, capsys) -> None:
    from fastffn.cli import commands

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "cli", interrupt)
    with pytest.raises(SystemExit) as stop:
        commands.run()
    assert stop.value.code == 130
    assert "with the same command" in capsys.readouterr().err


def test_a_run_is_not_a_checkpoint(model, text_file, tmp_path) -> None:
    refused(run("merge", model, tmp_path / "out"), f"Did you mean {model}/stage1")
    refused(run("evaluate", "perplexity", model, "--data", text_file), f"Did you mean {model}/stage2")


def test_output_is_needed() -> None:
    refused(run("pretrain"), "--output is missing")


def test_another_run_is_refused(model, text_file) -> None:
    done = run("pretrain", "--data", text_file, *TINY, "--seed", "7", "--output", model)
    refused(done, "seed: 0 there, 7 here", "--overwrite")
    assert (model / "results.json").is_file()


def test_nan_has_an_exit_code_of_its_own(text_file, tmp_path) -> None:
    flags = ["--learning-rate", "1e30", "--clip", "0", "--warmup-steps", "0", "--no-baseline"]
    done = run("pretrain", "--data", text_file, *TINY, *flags, "--output", tmp_path / "run")
    refused(done, "The loss is", "Lower the learning rate", code=1)


def test_unknown_command() -> None:
    refused(run("pretrian"), "Did you mean 'pretrain'")


def asked(*arguments: object):
    """A command in this process: a new one takes seconds to load torch."""
    return CliRunner().invoke(cli, ["experiment", *map(str, arguments)])


def test_fff_table_1(tmp_path) -> None:
    output = ("--output", tmp_path / "runs")
    small = ("--width", 4, "--leaf-widths", 2, "--epochs", 1, "--seeds", 1, "--repairs", 0, "--no-timing")
    done = asked("fff-table-1", *small, *output, "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["images"]["digits"]["rows"]
    assert list(rows) == ["dense-4", "dense-3", "dense-2", "leaf-2", "moe-2"]
    assert "leaf tree, leaf 2, depth 1" in (tmp_path / "runs" / "table.md").read_text()
    assert "epochs was 1, now 2" in str(asked("fff-table-1", *small, "--epochs", 2, *output).exception)
    assert "--output is missing" in str(asked("fff-table-1").exception)
    refused(run("experiment", "fff-table-1", "--images", "digit", "--output", tmp_path / "no"), "Did you mean 'digits'")


def test_tree_ladder(text_file, tmp_path) -> None:
    small = ("--layers", 1, "--d-model", 16, "--heads", 2, "--sequence", 16, "--tokenizer", "train:300", "--steps", 4)
    rhythm = ("--warmup-steps", 1, "--evaluate-every", 2, "--checkpoint-every", 4)
    rungs = ("--rungs", "tree-24x2", "--no-timing", "--output", tmp_path / "runs", "--json")
    done = asked("tree-ladder", "--data", text_file, *small, *rhythm, *rungs)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["rungs"]["tree-24x2"]["active"] == 72
    no = ("--output", tmp_path / "no")
    assert "chooses the FFNs itself" in str(asked("tree-ladder", "--ffn", "moe", *no).exception)
    assert "--output is missing" in str(asked("tree-ladder").exception)
    refused(run("experiment", "tree-ladder", "--rungs", "tree", *no), "Unknown rung 'tree'")


def test_time_to_loss(text_file, tmp_path) -> None:
    small = ("--layers", 1, "--d-model", 16, "--heads", 2, "--sequence", 16, "--tokenizer", "train:300", "--steps", 8)
    rhythm = ("--warmup-steps", 1, "--evaluate-every", 4, "--checkpoint-every", 8, "--lengths", 1, "--rates", 1e-3)
    rest = ("--recipes", "naive", "--seeds", 0, "--no-timing", "--output", tmp_path / "runs", "--json")
    done = asked("time-to-loss", "--data", text_file, *small, *rhythm, *rest)
    assert done.exit_code == 0, done.stderr
    assert list(json.loads(done.stdout)["screen"]) == ["dense", "naive"]
    assert "| naive" in (tmp_path / "runs" / "table.md").read_text()
    no = ("--output", tmp_path / "no")
    assert "recipes choose" in str(asked("time-to-loss", "--ffn", "moe", *no).exception)
    assert "--output is missing" in str(asked("time-to-loss").exception)
    refused(run("experiment", "time-to-loss", "--recipes", "naiv", *no), "Unknown recipe 'naiv'")
