"""What a distillation reads, for encoders: the pair is made up, since only the tokenizer and the task count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, RobertaConfig, RobertaModel

from fastffn.convert.loading import longest_sequence
from fastffn.errors import ConfigError, DataError
from fastffn.train.distill.models import Pair
from fastffn.train.distill.text import read_distill_text
from tests.data.test_sequences import WORDS
from tests.train.distill.pairs import tiny


@pytest.fixture
def bert_pair(tmp_path):
    """Directories of which the teacher's holds a tokenizer of BERT's kind."""
    from transformers import BertTokenizer

    (tmp_path / "student").mkdir()
    BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(tmp_path / "teacher")

    def make(task: str, **config) -> Pair:
        values = SimpleNamespace(**({"vocab_size": len(WORDS), "max_position_embeddings": 32} | config))
        return Pair(tmp_path / "student", tmp_path / "teacher", None, task, values)

    return make


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(["the cat sees a dog .", "the dog"] * 50) + "\n")
    return path


def test_masked_language_models(bert_pair, text) -> None:
    pair = bert_pair("masked")
    found = read_distill_text(tiny((pair.student, pair.teacher), text, validation_fraction=0.1), pair)
    assert found.masking is not None
    assert found.masking.mask_token == WORDS.index("[MASK]")
    assert set(found.masking.special_tokens) == {0, 1, 2, 3, 4}
    assert len(found.train) == 88  # of 90 the whole batches of 4
    batch = found.collate([found.train[n] for n in range(8)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 8)
    assert sorted(set(batch["attention_mask"].sum(1).tolist())) == [4, 8]
    assert found.train_tokens == sum(len(row["input_ids"]) for row in found.train)


def test_encoders_see_the_text_as_it_is(bert_pair, text) -> None:
    pair = bert_pair("states")
    assert read_distill_text(tiny((pair.student, pair.teacher), text), pair).masking is None


def test_a_tokenizer_that_does_not_fit(bert_pair, text) -> None:
    pair = bert_pair("masked", vocab_size=1000)
    with pytest.raises(DataError, match="has 11 tokens, the model 1000"):
        read_distill_text(tiny((pair.student, pair.teacher), text), pair)


def test_sequences_need_padding(text, tmp_path, tokenizer) -> None:
    """GPT-2's tokenizer has none; a GPT-2 without a head would need it."""
    tokenizer.save_pretrained(tmp_path)
    config = SimpleNamespace(vocab_size=300, max_position_embeddings=32)
    with pytest.raises(DataError, match="has no pad_token"):
        read_distill_text(tiny((tmp_path, tmp_path), text), Pair(tmp_path, tmp_path, None, "states", config))


def test_longest_sequences(bert_pair, text) -> None:
    """The limit that the error advises is one that the model takes: RoBERTa's positions begin after the padding's."""
    pair = bert_pair("masked", model_type="xlm-roberta", pad_token_id=1, max_position_embeddings=34)
    with pytest.raises(ConfigError, match="sequence is 33; the model takes 32 tokens at most"):
        read_distill_text(tiny((pair.student, pair.teacher), text, sequence=33), pair)
    read_distill_text(tiny((pair.student, pair.teacher), text, sequence=32), pair)
    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    assert longest_sequence(config) == 32
    RobertaModel(config)(torch.full((1, 32), 5))
    assert longest_sequence(GPT2Config(n_positions=34)) == 34
