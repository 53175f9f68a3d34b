"""`fastffn distill`, small: from a converted model to a report, through kills and mistakes."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fastffn.hf
from fastffn import LowRankConfig, LowRankFFN
from fastffn.convert.families import families
from fastffn.errors import CheckpointError, ConfigError, DataError, OutputError
from fastffn.evaluate.perplexity import evaluate_perplexity
from fastffn.train import checkpoints
from fastffn.train.distill.run import distill
from fastffn.train.distill.trainer import DistillTrainer
from fastffn.train.pretrain import pretrain
from tests.train.distill.pairs import save_gpt2_pair, tiny
from tests.train.test_pretrain import tiny as tiny_pretraining

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer):
    return save_gpt2_pair(tmp_path_factory.mktemp("pair"), tokenizer)


@pytest.fixture(scope="module")
def undisturbed(pair, text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, distill(tiny(pair, text_file), output)


def same_weights(one: Path, other: Path) -> bool:
    found = [load_file(path / "model.safetensors") for path in (one, other)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_everything_is_there(undisturbed) -> None:
    output, results = undisturbed
    assert {path.name for path in output.iterdir()} == {
        ".fastffn.lock",
        "config.yaml",
        "text.json",
        "before.json",
        "layers",
        "student",
        "results.json",
        "report.md",
    }
    assert json.loads((output / "results.json").read_text()) == results
    assert results["complete"] and results["model"] == "student"
    assert [results["stages"][name]["tokens"] for name in ("layers", "student")] == [8 * 4 * 16] * 2
    assert results["stages"]["student"]["seconds"] > results["stages"]["layers"]["seconds"] > 0
    assert (output / "student" / "tokenizer.json").is_file()
    report = (output / "report.md").read_text()
    assert "KL to teacher" in report and "transformer.h.1.mlp" in report


def test_each_phase_does_what_it_is_for(undisturbed) -> None:
    _, results = undisturbed
    before, layers, student = results["before"], *(record["held_out"] for record in results["stages"].values())
    assert layers["ffn_error"] < 0.9 * before["ffn_error"]
    assert all(layers["ffn_errors"][path] < error for path, error in before["ffn_errors"].items())
    assert student["kl"] < 0.9 * layers["kl"] < 0.9 * before["kl"]
    assert student["teacher_perplexity"] == before["teacher_perplexity"]


def test_the_first_phase_changes_only_ffns(undisturbed, pair) -> None:
    output, _ = undisturbed
    before, after = (load_file(path / "model.safetensors") for path in (pair[0], output / "layers"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name and before[name].ndim < 7}
    last = load_file(output / "student" / "model.safetensors")
    assert not torch.equal(last["transformer.wte.weight"], after["transformer.wte.weight"])


def test_what_comes_out_is_an_ordinary_checkpoint(undisturbed, text_file) -> None:
    output, results = undisturbed
    model = AutoModelForCausalLM.from_pretrained(output / "student")
    assert isinstance(model.transformer.h[0].mlp, LowRankFFN)
    assert model.transformer.h[0].mlp.config.dropout == 0.1
    found = evaluate_perplexity(output / "student", str(text_file), context=16, stride=8)
    assert found["token_perplexity"] < 2 * results["stages"]["student"]["held_out"]["student_perplexity"]


def test_held_out_measures_are_those_of_the_models(undisturbed, pair, text_file, tokenizer) -> None:
    from fastffn.data.blocks import token_blocks
    from fastffn.train.text import spread

    rows = spread(token_blocks(str(text_file), tokenizer, 16).validation, 16)
    ids = torch.tensor(rows["input_ids"][:])
    with torch.no_grad():
        student, teacher = (AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits.double() for path in pair)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    nats = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    before = undisturbed[1]["before"]
    assert before["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert before["student_perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)


def test_a_student_of_full_rank_starts_at_zero(text_file, tmp_path, tokenizer) -> None:
    pair = save_gpt2_pair(tmp_path, tokenizer, LowRankConfig(rank=24))
    before = distill(tiny(pair, text_file, layer_steps=0, steps=1), tmp_path / "run")["before"]
    assert before["ffn_error"] < 1e-9
    assert before["kl"] < 1e-7


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train.distill.test_run import killed
killed(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
"""


def killed(pair: Path, text: Path, output: Path, stage: str, step: int) -> None:
    """Distils in a process that is killed before a step."""
    train = DistillTrainer.training_step

    def kill(self, *args, **kwargs):
        if self.stage.name == stage and self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, *args, **kwargs)

    DistillTrainer.training_step = kill
    distill(tiny((pair / "student", pair / "teacher"), text), output)


def test_killed_twice_it_ends_the_same(undisturbed, pair, text_file, tmp_path, monkeypatch) -> None:
    output = tmp_path / "run"
    for stage, step in (("layers", 5), ("student", 7)):
        command = [sys.executable, "-c", KILLED, *map(str, (pair[0].parent, text_file, output, stage, step))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        newest, _ = checkpoints.newest_complete(output / stage)
        assert newest is not None and newest.name == f"checkpoint-{step // 3 * 3}"
    train, steps = DistillTrainer.training_step, []

    def count(self, *args, **kwargs):
        steps.append(self.stage.name)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", count)
    results = distill(tiny(pair, text_file), output)
    assert steps == ["student", "student"]  # from checkpoint-6 on
    for name in ("layers", "student"):
        assert same_weights(undisturbed[0] / name, output / name)
        assert results["stages"][name]["held_out"] == undisturbed[1]["stages"][name]["held_out"]
        assert results["stages"][name]["tokens"] == undisturbed[1]["stages"][name]["tokens"]


def test_killed_before_the_model_is_in_place(undisturbed, pair, text_file, tmp_path, monkeypatch) -> None:
    """The last checkpoint is there, the phase's model and mark are not."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fastffn.train.distill.run._Run._measure", interrupted_measure())
        with pytest.raises(KeyboardInterrupt):
            distill(tiny(pair, text_file), output)
    assert (output / "layers" / "checkpoint-8").is_dir() and not (output / "layers" / "stage.json").exists()
    (output / "layers" / "model.safetensors").unlink()
    distill(tiny(pair, text_file), output)
    for name in ("layers", "student"):
        assert same_weights(undisturbed[0] / name, output / name)


def interrupted_measure():
    from fastffn.train.distill.run import _Run

    measure, calls = _Run._measure, []

    def second_time(self, student):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, student)

    return second_time


def test_the_time_ends_first(pair, text_file, tmp_path) -> None:
    """Each call is given next to nothing: it measures, and says that it may go on."""
    output = tmp_path / "run"
    for _ in range(3):
        results = distill(tiny(pair, text_file), output, max_minutes=1e-9)
        assert results["complete"] is False and not (output / "results.json").exists()
    assert checkpoints.newest_complete(output / "layers")[0] is None
    assert "the same command goes on" in (output / "report.md").read_text()


def test_time_ends_within_a_phase(undisturbed, pair, text_file, tmp_path, monkeypatch) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fastffn.train.distill.run._Run._late", lambda self: False)
        results = distill(tiny(pair, text_file), output, max_minutes=1e-9)
    assert results["complete"] is False and results["stages"] == {}
    newest, _ = checkpoints.newest_complete(output / "layers")
    assert newest is not None and newest.name == "checkpoint-1"
    assert distill(tiny(pair, text_file), output, max_minutes=60)["complete"]
    assert same_weights(undisturbed[0] / "student", output / "student")


def test_only_ffns(pair, text_file, tmp_path) -> None:
    distill(tiny(pair, text_file, layer_steps=0, steps=3, trainable="ffn"), tmp_path / "run")
    before, after = (load_file(path / "model.safetensors") for path in (pair[0], tmp_path / "run" / "student"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_only_the_first_phase(pair, text_file, tmp_path) -> None:
    results = distill(tiny(pair, text_file, steps=0), tmp_path / "run")
    assert results["model"] == "layers" and list(results["stages"]) == ["layers"]


def test_micro_batches_are_one_batch(undisturbed, pair, text_file, tmp_path) -> None:
    """The same losses and gradients, though each step is made of two halves."""
    results = distill(tiny(pair, text_file, micro_batch=2), tmp_path / "run")
    for name in ("layers", "student"):
        logs = [
            json.loads((output / name / "checkpoint-8" / "trainer_state.json").read_text())["log_history"][0]
            for output in (undisturbed[0], tmp_path / "run")
        ]
        for value in ("loss", "grad_norm"):
            assert logs[0][value] == pytest.approx(logs[1][value], rel=0.02)
        assert results["stages"][name]["tokens"] == undisturbed[1]["stages"][name]["tokens"]


def test_a_finished_run_is_shown_again(undisturbed, pair, text_file, capsys) -> None:
    output, results = undisturbed
    assert distill(tiny(pair, text_file), output) == results
    assert "holds this run already, complete" in capsys.readouterr().out
    with pytest.raises(OutputError, match="steps: 8 there, 9 here"):
        distill(tiny(pair, text_file, steps=9), output)
    with pytest.raises(OutputError, match="holds a run of fastffn distill"):
        pretrain(tiny_pretraining(text_file), output)


def test_another_run_is_overwritten_on_request(pair, text_file, tmp_path) -> None:
    output = tmp_path / "run"
    distill(tiny(pair, text_file, layer_steps=0, steps=1), output)
    distill(tiny(pair, text_file, layer_steps=1, steps=0), output, overwrite=True)
    assert not (output / "student").exists()


def test_another_student_in_the_same_place_is_noticed(pair, text_file, tmp_path) -> None:
    for path in pair:
        shutil.copytree(path, tmp_path / path.name)
    copies = (tmp_path / "student", tmp_path / "teacher")
    distill(tiny(copies, text_file), tmp_path / "run", max_minutes=1e-9)
    (tmp_path / "run" / "layers").mkdir()
    shutil.copy(copies[1] / "model.safetensors", copies[0])
    with pytest.raises(OutputError, match="the student or the teacher"):
        distill(tiny(copies, text_file), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": "teacher"}, "holds no FastFFN kinds"),
        ({"teacher": "student"}, "is not dense"),
        ({"teacher": "other_vocabulary"}, "vocab_size is 300 in the student"),
        ({"teacher": "other_width"}, "hidden_size is 24 in the student"),
        ({"teacher": "no_head"}, "a GPT2Model; they must be of one architecture"),
        ({"student": "nowhere"}, "is not a directory"),
        ({"student": "run"}, "Did you mean"),
    ],
    ids=str,
)
def test_pairs_that_do_not_belong_together(pair, text_file, tmp_path, change, words) -> None:
    from transformers import GPT2LMHeadModel, GPT2Model

    for path in pair:
        shutil.copytree(path, tmp_path / path.name)
    shutil.copytree(pair[0], tmp_path / "run" / "student")
    GPT2LMHeadModel(tiny_gpt2(vocab_size=301)).save_pretrained(tmp_path / "other_vocabulary")
    GPT2LMHeadModel(tiny_gpt2(n_embd=12)).save_pretrained(tmp_path / "other_width")
    GPT2Model(tiny_gpt2()).save_pretrained(tmp_path / "no_head")
    names = {"student": "student", "teacher": "teacher"} | change
    config = tiny((tmp_path / names["student"], tmp_path / names["teacher"]), text_file)
    with pytest.raises(CheckpointError, match=words):
        distill(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tiny_gpt2(**changes):
    from tests.conftest import tiny_gpt2_config

    return tiny_gpt2_config(**({"vocab_size": 300} | changes))


def test_data_that_do_not_do(pair, text_file, tmp_path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:600])
    with pytest.raises(DataError, match="fewer than one batch of 400"):
        distill(tiny(pair, short, batch=400), tmp_path / "run")
    with pytest.raises(ConfigError, match="the model takes 32"):
        distill(tiny(pair, text_file, sequence=33), tmp_path / "run")
    with pytest.raises(ConfigError, match="inside the run's own directory"):
        distill(tiny(pair, text_file), pair[0].parent)
    bare = shutil.copytree(pair[0], tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="holds a tokenizer"):
        distill(tiny((bare, pair[1]), text_file), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", ""),
        ("temperature", 0.0),
        ("steps", -1),
        ("batch", 0),
        ("micro_batch", 3),
        ("trainable", "none"),
        ("validation_fraction", 0.9),
    ],
)
def test_fields_out_of_range(field, value) -> None:
    with pytest.raises(ConfigError, match=field):
        configured(**{field: value})
    with pytest.raises(ConfigError, match="nothing would be trained"):
        configured(layer_steps=0, steps=0)


def configured(**changes):
    from fastffn.train.distill.config import DistillConfig
    from tests.train.distill.pairs import SMALL

    return DistillConfig(**({"student": "s", "teacher": "t", "data": "d"} | SMALL | changes))


def test_a_model_without_a_head(text_file, tmp_path, tokenizer) -> None:
    """A GPT-2 alone learns the teacher's last hidden states; its sequences are padded."""
    from transformers import GPT2Model

    torch.manual_seed(1)
    model = GPT2Model(tiny_gpt2(initializer_range=0.2))
    model.save_pretrained(tmp_path / "teacher")
    fastffn.convert(model, LowRankConfig(rank=4))
    model.save_pretrained(tmp_path / "student")
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.eos_token
    padded.save_pretrained(tmp_path / "student")
    text = tmp_path / "text.txt"
    sentences = text_file.read_text().splitlines()[:400]
    text.write_text("\n<|endoftext|>\n".join(sentences) + "\n")
    pair = (tmp_path / "student", tmp_path / "teacher")
    with pytest.raises(ConfigError, match="GPT2Model predicts no tokens"):
        distill(tiny(pair, text, text_weight=0.5), tmp_path / "run")
    results = distill(tiny(pair, text, steps=20), tmp_path / "run")
    before, after = results["before"], results["stages"]["student"]["held_out"]
    assert after["token_error"] < 0.9 * before["token_error"]
    assert after["sentence_distance"] < before["sentence_distance"]
    assert after["loss"] == pytest.approx(after["token_error"] + after["sentence_distance"])
    # Padding is not counted: sentences are shorter than 16 tokens.
    assert 0 < results["stages"]["student"]["tokens"] < 20 * 4 * 16
    assert "error of tokens" in (tmp_path / "run" / "report.md").read_text()


def test_several_processes_are_refused(pair, text_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fastffn.train.processes.count", lambda: 2)
    with pytest.raises(ConfigError, match="one process and was started in 2"):
        distill(tiny(pair, text_file), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def knows(model_type: str) -> bool:
    return any(model_type in str(vars(type(family))) for family in families())


@pytest.mark.skipif(not knows("bert"), reason="conversion knows no BERT")
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel"])
def test_encoders(name, tmp_path, monkeypatch) -> None:
    """From a converted BERT to a report; interrupted, its masks and so its weights end the same."""
    import transformers

    from tests.data.test_sequences import WORDS

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(tmp_path / "teacher")
    fastffn.convert(model, LowRankConfig(rank=6))
    model.save_pretrained(tmp_path / "student")
    words = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=words).save_pretrained(tmp_path / "student")
    text = tmp_path / "text.txt"
    documents = ["the cat sees a dog . a dog sees the cat .", "the dog", "a cat . the cat"] * 100
    text.write_text("\n<|endoftext|>\n".join(documents) + "\n")
    run = tiny((tmp_path / "student", tmp_path / "teacher"), text, layer_steps=20, steps=20)
    results = distill(run, tmp_path / "whole")
    before, layers, student = results["before"], *(record["held_out"] for record in results["stages"].values())
    assert layers["ffn_error"] < 0.9 * before["ffn_error"]
    assert student["loss"] < 0.9 * layers["loss"] < 0.9 * before["loss"]
    assert ("teacher_perplexity" in before) is (name == "BertForMaskedLM")

    step = DistillTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill(run, tmp_path / "run")
    distill(run, tmp_path / "run")
    assert same_weights(tmp_path / "whole" / "student", tmp_path / "run" / "student")
