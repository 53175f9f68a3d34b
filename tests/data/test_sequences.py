from __future__ import annotations

import numpy as np
import pytest
import torch

from fastffn.data.sequences import pad, token_sequences
from fastffn.errors import DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sees", "a", "dog", "."]


@pytest.fixture
def words():
    """A tokenizer with BERT's special tokens, one token a word."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    sentence = "the cat sees a dog . " * 5
    path.write_text("\n<|endoftext|>\n".join([sentence.strip(), "the dog"] * 30) + "\n")
    return path


def test_sequences_are_cut_documents_with_special_tokens(words, text) -> None:
    found = token_sequences(str(text), words, 12, validation_fraction=0.1)
    whole = [2, *([5, 6, 7, 8, 9, 10] * 5)[:10], 3]
    lengths = {len(row["input_ids"]) for row in found.train}
    assert max(lengths) == 12
    assert any(row["input_ids"].tolist() == whole for row in found.train)
    assert any(row["input_ids"].tolist() == [2, 5, 9, 3] for row in found.train)
    assert all(row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 for row in found.train)
    # Of each document of 30 words three sequences, of the others one; every tenth document is held out.
    assert len(found.train) + len(found.validation) == 30 * 3 + 30
    assert len(found.validation) == 6 * 3
    assert found.held_out == "documents"
    assert found.train.tokens == sum(len(row["input_ids"]) for row in found.train)


def test_identity_changes_with_what_is_made(words, text, tmp_path) -> None:
    first = token_sequences(str(text), words, 12).identity
    assert token_sequences(str(text), words, 12).identity == first
    assert token_sequences(str(text), words, 11).identity != first
    assert token_sequences(str(text), words, 12, validation_fraction=0.3).identity != first
    (tmp_path / "other.txt").write_text("the cat .\n" * 5)
    other = token_sequences(str(text), words, 12, validation=str(tmp_path / "other.txt"))
    assert other.identity != first
    assert other.held_out == "validation text"


def test_too_little_text(words, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("the cat\n")
    with pytest.raises(DataError, match="is empty after 1 in 20"):
        token_sequences(str(tmp_path / "text.txt"), words, 12)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt\) is empty\. Give more text\.$"):
        token_sequences(str(tmp_path / "text.txt"), words, 12, validation=str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="no room for text beside 2"):
        token_sequences(str(tmp_path / "text.txt"), words, 2)


def test_a_batch_is_padded_to_its_longest() -> None:
    rows = [{"input_ids": np.array(ids, np.int32)} for ids in ([2, 5, 3], [2, 3], [2, 5, 6, 7, 3])]
    batch = pad(rows, padding=9)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [[2, 5, 3, 9, 9], [2, 3, 9, 9, 9], [2, 5, 6, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
