"""`fastffn convert` as a user meets it, and `fastffn merge` after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fastffn.hf  # noqa: F401  (so that checkpoints load)
from fastffn.cli.commands import cli
from fastffn.convert.convert_command import checkpoint_directory
from fastffn.convert.match import fastffn_modules
from fastffn.errors import FastFFNError
from tests.cli.test_cli import refused, run
from tests.convert.models import MODELS, first_output, make

FAMILIES = ["gpt2", "roberta-classifier", "llama-tied"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A directory with a tokenizer of fewer tokens than the models have, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("words")
    core = Tokenizer(models.WordLevel({f"w{n}": n for n in range(90)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(directory / "tokenizer")
    (directory / "text.txt").write_text(" ".join(f"w{n * n % 89 + 1}" for n in range(3000)))
    return directory


def saved(name: str, directory: Path, words: Path) -> Path:
    make(name).save_pretrained(directory)
    for file in (words / "tokenizer").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "training_args.bin").write_bytes(b"none of the model's")
    return directory


def call(*arguments: object):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def failed(result, *said: str) -> None:
    error = result.exception
    assert (error.exit_code if isinstance(error, FastFFNError) else result.exit_code) == 2, error
    text = str(error) if isinstance(error, FastFFNError) else result.output
    for word in said:
        assert word in text, text


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_convert_and_merge(name, tmp_path, words) -> None:
    source, target = saved(name, tmp_path / "in", words), tmp_path / "deep" / "out"
    options = ["--ffn", "low_rank", "--rank", 5, "--calibration", words / "text.txt", "--calibration-tokens", 900]
    done = run("convert", source, target, *options, "--layers", "1", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert [layer["kind"] for layer in result["layers"]] == ["left as it was", "low_rank"]
    assert result["layers"][1]["config"]["rank"] == 5
    told = done.stderr.splitlines()
    assert told[0] == f"loading {source} ({MODELS[name][0]})" and told[-1] == f"writing {target}"
    assert told[1] == "calibration: 900 tokens read" and "low_rank (1 of 1)" in told[2]
    there = {path.name for path in target.iterdir()}
    assert there >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert ("generation_config.json" in there) is (name != "roberta-classifier") and "training_args.bin" not in there
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    loaded = type(make(name)).from_pretrained(target)
    assert len(list(fastffn_modules(loaded))) == 1
    # The head is the model's own.
    head = [value for key, value in loaded.state_dict().items() if key.startswith(("lm_head", "classifier"))]
    own = [value for key, value in make(name).state_dict().items() if key.startswith(("lm_head", "classifier"))]
    assert head and all(map(torch.equal, head, own))

    merged = run("merge", target, tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    assert "1 FFNs merged" in merged.stdout
    dense = type(make(name)).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(first_output(dense), first_output(loaded), rtol=1e-3, atol=1e-4)


def test_table_dtype_and_speeds(tmp_path, words, monkeypatch) -> None:
    source = saved("gpt2", tmp_path / "in", words)
    result = call(source, tmp_path / "out", "--ffn", "block", "--blocks", 2, "--dtype", "bf16", "--measure")
    assert result.exit_code == 0, result.exception
    rows = [line for line in result.stdout.splitlines() if line.startswith("transformer.h.")]
    assert len(rows) == 2 and all("block" in row and row.count(" x") == 2 for row in rows)
    assert "active a token" in result.stdout and "speed, 256 tokens" in result.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ffn", "low_rnk"], "Did you mean 'low_rank'"),
        (["--rank", "3"], "--ffn"),
        (["--ffn", "low_rank", "--depth", "3"], "no field 'depth'"),
        (["--ffn", "low_rank", "--rank", "99"], "rank"),
        (["--ffn", "low_rank", "--layers", "0-7"], "their numbers are 0 to 1"),
        (["--ffn", "low_rank", "--filter", "h.0.mlp"], "No FFN matches the pattern 'h.0.mlp'"),
        (["--ffn", "low_rank", "--filter", "*.1.mlp", "--layers", "0"], "the filter took none"),
        (["--ffn", "low_rank", "--calibration", "nothing.txt"], "nothing.txt does not exist"),
        (["--ffn", "low_rank", "--calibration", "TEXT", "--calibration-tokens", "0"], "must be at least 1"),
        (["--ffn", "low_rank", "--calibration", "TEXT", "--calibration-tokens", "9"], "has 9 tokens"),
        (["--ffn", "low_rank", "--calibration", "TEXT", "--calibration-sequence", "3"], "must be at least 4"),
        (["--ffn", "low_rank", "--dtype", "int8"], "int8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(options, said, tmp_path, words) -> None:
    source = saved("gpt2", tmp_path / "in", words)
    options = [str(words / "text.txt") if option == "TEXT" else option for option in options]
    failed(call(source, tmp_path / "out", *options), said)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_length_of_calibration_sequences(tmp_path, words, monkeypatch) -> None:
    """What the option says, never more than the model has positions."""
    import fastffn.data.batches

    lengths = []
    whole = fastffn.data.batches.text_batches

    def counted(*arguments, **named):
        for batch in whole(*arguments, **named):
            lengths.append(batch["input_ids"].shape[1])
            yield batch

    monkeypatch.setattr(fastffn.data.batches, "text_batches", counted)
    source = saved("gpt2", tmp_path / "in", words)
    options = ["--ffn", "low_rank", "--calibration", words / "text.txt", "--calibration-tokens", 300]
    for number, (asked, got) in enumerate({10: 10, 5000: make("gpt2").config.max_position_embeddings}.items()):
        result = call(source, tmp_path / f"out{number}", *options, "--calibration-sequence", asked)
        assert result.exit_code == 0, result.exception
        assert max(lengths) == got, lengths
        lengths.clear()


LOW_RANK = ["--ffn", "low_rank", "--rank", "5"]


def test_calibration_in_another_column(tmp_path, words) -> None:
    """The error that a data set without `text` gets names an option that there is."""
    source = saved("gpt2", tmp_path / "in", words)
    rows = [{"content": (words / "text.txt").read_text()[n : n + 400]} for n in range(0, 4000, 400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*LOW_RANK, "--calibration", tmp_path / "rows.jsonl", "--calibration-tokens", 300]
    failed(call(source, tmp_path / "out", *options), "--text-column")
    assert call(source, tmp_path / "out", *options, "--text-column", "content").exit_code == 0


def test_a_name_on_a_hub_has_its_tokenizer_too(tmp_path, words, monkeypatch) -> None:
    """All of a snapshot but the weights, which are loaded when they are needed."""
    import huggingface_hub
    from transformers.utils import hub

    there, here = saved("gpt2", tmp_path / "there", words), tmp_path / "here"
    here.mkdir()

    def cached_file(name, file):
        return shutil.copy(there / file, here / file)

    def snapshot_download(name, *, allow_patterns):
        for file in there.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, here / file.name)

    monkeypatch.setattr(hub, "cached_file", cached_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint_directory("somebody/model") == here
    found = {file.name for file in here.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= found
    assert not found & {"model.safetensors", "training_args.bin"}


def test_sources_that_are_none(tmp_path, words) -> None:
    source = saved("gpt2", tmp_path / "in", words)
    failed(call(tmp_path / "nowhere", tmp_path / "out", *LOW_RANK), "not a directory")
    failed(call("nobody/nothing", tmp_path / "out", *LOW_RANK), "neither a directory nor a model that can be loaded")
    failed(call(words / "text.txt", tmp_path / "out", *LOW_RANK), "not a directory")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    failed(call(tmp_path / "a.gguf", tmp_path / "out", *LOW_RANK), "GGUF file", "dequantize=True")
    (tmp_path / "run" / "stage2").mkdir(parents=True)
    failed(call(tmp_path / "run", tmp_path / "out", *LOW_RANK), "Did you mean", "stage2")
    assert call(source, tmp_path / "converted", *LOW_RANK).exit_code == 0
    failed(call(tmp_path / "converted", tmp_path / "out", *LOW_RANK), "fastffn merge")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    failed(call(source, tmp_path / "out", *LOW_RANK), "quantised (gptq)")
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    failed(call(source, tmp_path / "out", *LOW_RANK), "not those of a BertForMaskedLM")
    (source / "config.json").write_text(json.dumps(config | {"architectures": None}))
    failed(call(source, tmp_path / "out", *LOW_RANK), "names no architecture")
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-50])
    failed(call(source, tmp_path / "out", *LOW_RANK), "corrupt or cut short")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_tokenizer_of_another_model(tmp_path, words) -> None:
    source = saved("gpt2", tmp_path / "in", words)
    core = json.loads((source / "tokenizer.json").read_text())
    core["model"]["vocab"] |= {f"more{n}": n for n in range(90, 200)}
    (source / "tokenizer.json").write_text(json.dumps(core))
    failed(call(source, tmp_path / "out", *LOW_RANK, "--calibration", words / "text.txt"), "200 tokens", "97")


@pytest.mark.slow
def test_output_in_use_and_a_full_disk(tmp_path, words) -> None:
    source = saved("gpt2", tmp_path / "in", words)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    refused(run("convert", source, tmp_path / "out", *LOW_RANK), "exists already")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    # Files may not grow beyond 20 KB: what a full disk does, as far as a process can tell.
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from fastffn.cli import main; main()"
    )
    done = run("convert", source, tmp_path / "new", *LOW_RANK, code=code)
    refused(done, "The disk is full, or files may not grow", f"{tmp_path / 'new'} was not written")
    assert call(source, tmp_path / "converted", *LOW_RANK).exit_code == 0
    done = run("merge", tmp_path / "converted", tmp_path / "new", code=code)
    refused(done, "The disk is full, or files may not grow", f"{tmp_path / 'new'} was not written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "in", "out"]


def budgeted(source: Path, target: Path, words: Path, *more: object):
    options = ["--calibration", words / "text.txt", "--calibration-tokens", 600, "--held-out-tokens", 400]
    return call(source, target, *options, *more)


def test_within_a_budget(tmp_path, words, monkeypatch) -> None:
    from fastffn.convert.budget import search
    from tests.convert.budget.test_search import by_flops

    monkeypatch.setattr(search, "measure_speed", by_flops)
    source = saved("gpt2", tmp_path / "in", words)
    result = budgeted(source, tmp_path / "out", words, "--max-loss-increase", "300%", "--ffn", "low_rank,narrow")
    assert result.exit_code == 0, result.output
    assert "a loss at most 300 % higher, on 368 held-out tokens:" in result.stdout and "taken" in result.stdout
    stored = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert stored["held_out_tokens"] == 368 and stored["chosen"]["changed"] == 2
    assert (tmp_path / "out" / "tradeoff.png").exists()
    loaded = type(make("gpt2")).from_pretrained(tmp_path / "out")
    assert len(list(fastffn_modules(loaded))) == 2

    source = saved("roberta-classifier", tmp_path / "encoder", words)
    result = budgeted(source, tmp_path / "similar", words, "--min-similarity", 0.01, "--layers", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["chosen"]["changed"] == 1
    result = budgeted(source, tmp_path / "no", words, "--min-similarity", 0.9999999)
    failed(result, "Nothing pays here", "a similarity of at least 0.9999999")
    assert not (tmp_path / "no").exists()
    assert budgeted(source, tmp_path / "no", words, "--min-similarity", 0.9999999, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-loss-increase", "a bit"], ["--max-loss-increase is 'a bit'", "2% or 0.02"]),
        (["--max-loss-increase", "2"], ["would be 200 %", "give 2% or 0.02"]),
        (["--max-loss-increase", "2%", "--min-similarity", "0.9"], ["give one of them"]),
        (["--max-loss-increase", "2%", "--rank", "3"], ["leave out --rank"]),
        (["--max-loss-increase", "2%", "--ffn", "low_rang"], ["Did you mean 'low_rank'?"]),
        (["--max-loss-increase", "2%", "--held-out-tokens", "0"], ["--held-out-tokens is 0"]),
        (["--max-loss-increase", "2%", "--calibration-tokens", "100000"], ["nothing is left to measure on"]),
        (["--ffn", "low_rank", "--force"], ["--force and --speed-at belong to a budget"]),
        ([], ["Name a kind with --ffn, or a budget"]),
        (
            ["--max-loss-increase", "2%", "--ffn", "narrow,block"],
            ["The kind 'block' has no sizes to search for", "low_rank", "without one: --ffn block and its options"],
        ),
    ],
)
def test_budgets_that_are_refused(options, said, tmp_path, words) -> None:
    source = saved("gpt2", tmp_path / "in", words)
    failed(budgeted(source, tmp_path / "out", words, *options), *said)
    assert not (tmp_path / "out").exists()


def test_a_budget_needs_text(tmp_path, words) -> None:
    source = saved("gpt2", tmp_path / "in", words)
    failed(call(source, tmp_path / "out", "--max-loss-increase", "2%"), "A budget needs text", "--calibration")
