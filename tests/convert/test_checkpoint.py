"""The weight transform on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastffn
from fastffn import LowRankConfig
from fastffn.convert import checkpoint as module
from fastffn.convert.checkpoint import merge_checkpoint
from fastffn.convert.files import new_directory, write_text
from fastffn.convert.merge_command import merge_and_compare
from fastffn.errors import CheckpointError, OutputError


@pytest.fixture
def factorised(gpt2, tmp_path) -> Path:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    for left_behind in ("trainer_state.json", "complete.json"):
        (tmp_path / "in" / left_behind).write_text("{}")
    return tmp_path / "in"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_equals_merging_in_memory(factorised, gpt2, tokens, tmp_path) -> None:
    report = merge_checkpoint(factorised, tmp_path / "out")
    assert report.layers == ("transformer.h.0.mlp", "transformer.h.1.mlp")
    fastffn.merge(gpt2)
    expected = gpt2.state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(expected) - set(merged) == {"lm_head.weight"}  # tied to the embedding
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name
    assert names(tmp_path / "out") == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert report.parameters_after == sum(p.numel() for p in gpt2.parameters())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(tokens).logits, gpt2(tokens).logits)


def test_biases_are_the_very_same(factorised, tmp_path) -> None:
    report = merge_checkpoint(factorised, tmp_path / "out")
    assert report.same_tensors["transformer.h.1.mlp.c_proj.bias"] == "transformer.h.1.mlp.down.b.bias"
    assert "transformer.h.1.mlp.c_proj.weight" not in report.same_tensors
    before, after = load_file(factorised / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for new, old in report.same_tensors.items():
        assert torch.equal(after[new], before[old]), new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(gpt2, tmp_path, dtype) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5))
    gpt2.to(dtype).save_pretrained(tmp_path / "in")
    merge_checkpoint(tmp_path / "in", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    stem = "transformer.h.0.mlp"
    exact = before[f"{stem}.up.b.weight"].double() @ before[f"{stem}.up.a.weight"].double()
    assert after[f"{stem}.c_fc.weight"].dtype == dtype
    assert torch.equal(after[f"{stem}.c_fc.weight"], exact.T.to(dtype))


def test_files_in_pieces(factorised, gpt2, tokens, tmp_path) -> None:
    gpt2.save_pretrained(tmp_path / "pieces", max_shard_size="8KB")
    merge_checkpoint(tmp_path / "pieces", tmp_path / "out", max_shard_bytes=10_000)
    assert "model.safetensors.index.json" in names(tmp_path / "out")
    merge_checkpoint(factorised, tmp_path / "whole")
    pieces, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("out", "whole"))
    assert torch.equal(pieces(tokens).logits, whole(tokens).logits)


def test_layers_left_alone_stay_alone(gpt2, tmp_path) -> None:
    fastffn.convert(gpt2, LowRankConfig(rank=5), filter=lambda path: ".1." in path)
    gpt2.save_pretrained(tmp_path / "in")
    report = merge_checkpoint(tmp_path / "in", tmp_path / "out")
    assert report.layers == ("transformer.h.1.mlp",)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["transformer.h.0.mlp.c_fc.weight"], gpt2.transformer.h[0].mlp.c_fc.weight)


def test_dense_is_refused(gpt2, tmp_path) -> None:
    gpt2.save_pretrained(tmp_path / "in")
    with pytest.raises(CheckpointError, match="no factors to merge"):
        merge_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_refused(factorised, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        merge_checkpoint(factorised, tmp_path / "out")
    assert names(tmp_path / "out") == ["mine.txt"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
            "model.safetensors",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 1000), "model.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "neither"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
    ],
    ids=["cut", "empty", "garbage", "missing", "half a config", "a list", "no config"],
)
def test_damage_is_named_and_nothing_is_left(factorised, tmp_path, damage, words) -> None:
    damage(factorised)
    with pytest.raises(CheckpointError, match=words):
        merge_checkpoint(factorised, tmp_path / "out")
    assert names(tmp_path) == ["in"]


def test_a_missing_factor_is_named(factorised, tmp_path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(factorised / "model.safetensors")
    del tensors["transformer.h.1.mlp.up.a.weight"]
    save_file(tensors, factorised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.up\.a\.weight"):
        merge_checkpoint(factorised, tmp_path / "out")
    assert names(tmp_path) == ["in"]


def test_a_failure_in_the_middle_leaves_nothing(factorised, tmp_path, monkeypatch) -> None:
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "write_checkpoint", fail)
    with pytest.raises(OSError, match="No space"):
        merge_checkpoint(factorised, tmp_path / "out")
    assert calls
    assert names(tmp_path) == ["in"]


def test_compare_refuses_another_function(factorised, tmp_path, monkeypatch) -> None:
    result = merge_and_compare(factorised, tmp_path / "good")
    assert result["largest_difference"] < 1e-4 * result["largest_logit"]
    monkeypatch.setattr(module, "_merged", lambda reader, rule, where: 2 * _right(reader, rule, where))
    with pytest.raises(CheckpointError, match="not the same function"):
        merge_and_compare(factorised, tmp_path / "bad")
    assert names(tmp_path) == ["good", "in"]


_right = module._merged


def test_new_directory(tmp_path) -> None:
    with new_directory(tmp_path / "deep" / "target") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "deep" / "target").exists()
    assert names(tmp_path / "deep") == ["target"]
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "deep" / "other"):
        raise KeyboardInterrupt
    assert names(tmp_path / "deep") == ["target"]


def test_write_text_keeps_the_old_file_on_failure(tmp_path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


MEMORY_SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
from fastffn.convert.checkpoint import merge_checkpoint
import fastffn.hf, transformers.models.gpt2.modeling_gpt2

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

# What is imported and set up once does not count.
merge_checkpoint(Path(sys.argv[3]), Path(sys.argv[2] + "-small"))
before = anonymous()
watcher = threading.Thread(target=watch); watcher.start()
merge_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
running = False; watcher.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_is_that_of_the_largest_matrix(factorised, tmp_path) -> None:
    from transformers import GPT2LMHeadModel

    from tests.conftest import tiny_gpt2_config

    model = GPT2LMHeadModel(tiny_gpt2_config(n_embd=768, n_layer=24, n_head=12))
    fastffn.convert(model, LowRankConfig(rank=8, start="normal"))
    model.save_pretrained(tmp_path / "large")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "large"), str(tmp_path / "out"), str(factorised)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    used, model_bytes = int(done.stdout), (tmp_path / "out" / "model.safetensors").stat().st_size
    # A product in float64, its rounding to float32 and that transposed take 38 MB; the allocator keeps some of what
    # was freed. All of the model would be 680 MB.
    assert used < model_bytes / 5, (used, model_bytes)


def test_config_json_keeps_everything_else(factorised, tmp_path) -> None:
    merge_checkpoint(factorised, tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    del before["quantization_config"]
    assert after == before
