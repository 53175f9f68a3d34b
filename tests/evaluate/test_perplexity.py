from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from click.testing import CliRunner

import fastffn
from fastffn import LowRankConfig
from fastffn.cli.commands import cli
from fastffn.errors import CheckpointError, ConfigError, DataError
from fastffn.evaluate.perplexity import evaluate_perplexity, windows
from tests.conftest import tiny_gpt2_config


@pytest.fixture
def model(tokenizer, tmp_path):
    """A directory with a random model and its tokenizer."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(1)
    net = GPT2LMHeadModel(tiny_gpt2_config(vocab_size=300, initializer_range=0.2))
    net.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


TEXT = "the cat sees the river. no machine forgets ähnlich.\n" * 6


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def by_hand(model, tokenizer, context: int, stride: int) -> float:
    """Nats of all tokens but the first, one token at a time."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    total = 0.0
    for position in range(1, len(tokens)):
        # The first window that reaches the position.
        begin = max(0, math.ceil((position + 1 - context) / stride)) * stride
        logits = net(torch.tensor([tokens[begin:position]])).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, 0)[tokens[position]])
    return total


@pytest.mark.parametrize(("context", "stride", "batch"), [(32, 16, 1), (32, 16, 5), (32, 31, 3), (20, 1, 8), (7, 3, 4)])
def test_equals_the_sum_by_hand(model, text, tokenizer, context, stride, batch) -> None:
    result = evaluate_perplexity(model, str(text), context=context, stride=stride, batch=batch)
    with torch.no_grad():
        expected = by_hand(model, tokenizer, context, stride)
    assert result["nll"] == pytest.approx(expected, rel=1e-5)
    n_tokens = len(tokenizer(TEXT)["input_ids"])
    assert result["tokens"] == n_tokens  # the end of text is scored, the first token is not
    assert result["token_perplexity"] == pytest.approx(math.exp(expected / n_tokens), rel=1e-4)
    assert result["words"] == 9 * 6
    assert result["word_perplexity"] == pytest.approx(math.exp(expected / 54), rel=1e-3)
    assert result["bytes"] == len(TEXT.encode()) == len(TEXT) + 6
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert json.loads(json.dumps(result)) == result


def test_every_format_and_documents(model, tokenizer, tmp_path, monkeypatch) -> None:
    """The same documents give the same figures, wherever they stand, and however they are batched."""
    from fastffn.data import tokenise

    documents = [TEXT.strip() + f" {n}." for n in range(5)]
    (tmp_path / "a.txt").write_text("\n--\n".join(documents), encoding="utf-8")
    lines = "\n".join(json.dumps({"body": document, "text": "other"}) for document in documents)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    one = evaluate_perplexity(model, str(tmp_path / "a.txt"), separator="--")
    monkeypatch.setattr(tokenise, "_BATCH_CHARACTERS", 10)
    other = evaluate_perplexity(model, str(tmp_path / "a.jsonl.gz"), column="body")
    for name in ("nll", "tokens", "words", "bytes"):
        assert one[name] == other[name]
    assert one["tokens"] == sum(len(tokenizer(document)["input_ids"]) + 1 for document in documents) - 1
    assert one["words"] == 5 * (9 * 6 + 1)


def test_long_windows_go_in_smaller_batches(model, text, monkeypatch) -> None:
    """Logits of 8 windows of 8,192 tokens and a vocabulary of 50,000 would be 13 GB."""
    from fastffn.evaluate import perplexity

    seen, nll = [], perplexity._nll
    monkeypatch.setattr(perplexity, "_nll", lambda *given: seen.append(given[4]) or nll(*given))
    for most, expected in ((8192, 8), (100, 3), (10, 1)):
        monkeypatch.setattr(perplexity, "_TOKENS", most)
        evaluate_perplexity(model, str(text))
        assert seen.pop() == expected


@pytest.mark.parametrize("length", range(2, 40))
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 7), (8, 1), (5, 3)])
def test_every_token_is_scored_once(length, context, stride) -> None:
    scored = []
    for begin, end, first in windows(length, context, stride):
        assert end - begin <= context
        assert first > begin
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_factorised_models_load(model, text) -> None:
    from transformers import AutoModelForCausalLM

    before = evaluate_perplexity(model, str(text))
    net = AutoModelForCausalLM.from_pretrained(model)
    fastffn.convert(net, LowRankConfig(rank=24))
    net.save_pretrained(model)
    after = evaluate_perplexity(model, str(text))
    assert after["nll"] == pytest.approx(before["nll"], rel=1e-5)
    assert (before["context"], before["stride"]) == (32, 16)


def test_encoders_are_refused(model, text) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(CheckpointError, match="is a BertModel, no causal language model"):
        evaluate_perplexity(model, str(text))


def test_what_is_refused(model, text, tmp_path, data_dir) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        evaluate_perplexity(tmp_path / "nothing", str(text))
    with pytest.raises(DataError, match=r"50257 tokens, the model .* 300"):
        evaluate_perplexity(model, str(text), tokenizer=str(data_dir / "gpt2-tokenizer"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context": 33}, "from 2 to 32"),
        ({"context": 1}, "from 2 to 32"),
        ({"stride": 32}, "from 1 to context - 1 = 31"),
        ({"stride": -1}, "stride is -1"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_bad_windows(model, text, settings, words) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate_perplexity(model, str(text), **settings)


def test_a_corrupt_model_is_named(model, text) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=str(model)):
        evaluate_perplexity(model, str(text))


def test_text_without_white_space(model, tmp_path) -> None:
    """The perplexity of such long words would be no number."""
    (tmp_path / "text.txt").write_text("没有空格" * 150, encoding="utf-8")
    result = evaluate_perplexity(model, str(tmp_path / "text.txt"))
    assert result["word_perplexity"] is None
    assert result["token_perplexity"] == pytest.approx(math.exp(result["nll"] / result["tokens"]))
    shown = CliRunner().invoke(cli, ["evaluate", "perplexity", str(model), "--data", str(tmp_path / "text.txt")])
    assert shown.exit_code == 0 and "perplexity per word   none" in shown.output
