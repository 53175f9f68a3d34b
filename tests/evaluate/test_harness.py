"""lm-eval on a checkpoint, with a task and data of our own: by the command line, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastffn
from fastffn import LowRankConfig
from fastffn.errors import MissingDependencyError
from tests.conftest import tiny_gpt2_config

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'fastffn[eval]'"
)
QUESTIONS = [
    {"question": "the cat sees", "choices": [" the river", " a dog", " my neighbour"], "answer": 0},
    {"question": "a dog forgets", "choices": [" its own shadow", " a warm stone"], "answer": 1},
    {"question": "no machine repairs", "choices": [" the long road", " every child"], "answer": 0},
    {"question": "my neighbour", "choices": [" believes the old clock", " measures"], "answer": 1},
    {"question": "every child", "choices": [" follows a small house", " sees"], "answer": 0},
]
TASK = """
task: sentences
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 3.0
"""


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from fastffn.cli import main; main()", "evaluate", "harness"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    """A random GPT-2 with low-rank FFNs, and its tokenizer."""
    from transformers import GPT2LMHeadModel

    where = tmp_path_factory.mktemp("harness") / "model"
    torch.manual_seed(1)
    net = GPT2LMHeadModel(tiny_gpt2_config(vocab_size=300, initializer_range=0.3))
    fastffn.convert(net, LowRankConfig(rank=4))
    net.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("tasks")
    (where / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (where / "sentences.yaml").write_text(TASK.format(data=where / "questions.json"))
    return where


def right_by_hand(model: Path, tokenizer) -> int:
    """How often the right answer is the likeliest continuation."""
    from transformers import AutoModelForCausalLM

    import fastffn.hf  # noqa: F401

    net = AutoModelForCausalLM.from_pretrained(model).eval()
    right = 0
    for row in QUESTIONS:
        nats = []
        for choice in row["choices"]:
            asked, said = (tokenizer(row["question"] + x)["input_ids"] for x in ("", choice))
            ids = torch.tensor([said])
            with torch.no_grad():
                scores = net(ids).logits[0, :-1].log_softmax(-1)
            nats.append(sum(float(scores[n - 1, ids[0, n]]) for n in range(len(asked), len(said))))
        right += nats.index(max(nats)) == row["answer"]
    return right


@needs_lm_eval
def test_a_local_task(model, tasks, tokenizer) -> None:
    done = run(model, "--tasks", "sentences", "--include-path", tasks, "--batch-size", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["results"]["sentences"]["acc"]["value"] == pytest.approx(right_by_hand(model, tokenizer) / 5)
    assert result["results"]["sentences"]["acc"]["stderr"] > 0
    assert result["examples"] == {"sentences": 5}
    assert result["task_versions"] == {"sentences": 3.0}


@needs_lm_eval
def test_table_and_limit(model, tasks) -> None:
    done = run(model, "--tasks", "sentences", "--include-path", tasks, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "sentences" in done.stdout and "acc" in done.stdout
    assert "at most 2 examples" in done.stdout


@needs_lm_eval
def test_mistakes_are_named(model, tasks, tmp_path) -> None:
    from transformers import GPT2Model

    GPT2Model(tiny_gpt2_config()).save_pretrained(tmp_path / "headless")
    for arguments, words in (
        ((model, "--tasks", "sentence", "--include-path", tasks), "Did you mean 'sentences'?"),
        ((model, "--tasks", "sentences", "--include-path", tmp_path / "no"), "is no folder"),
        ((model, "--tasks", "sentences", "--include-path", tasks, "--limit", 0), "limit is 0"),
        ((tmp_path / "headless", "--tasks", "sentences"), "want a causal language model"),
        ((tmp_path / "nothing", "--tasks", "sentences"), "is not a directory"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert words in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr


def test_without_lm_eval(model, monkeypatch) -> None:
    from fastffn.evaluate.harness import evaluate_harness

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fastffn\[eval\]'"):
        evaluate_harness(model, ["sentences"])
