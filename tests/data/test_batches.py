"""Batches of a text for calibration."""

from __future__ import annotations

import pytest
import torch

from fastffn.data.batches import BATCH, text_batches
from fastffn.data.text import find_text
from fastffn.errors import DataError


def flat(batches) -> list[int]:
    return [token for b in batches for token in b["input_ids"][b["attention_mask"].bool()].tolist()]


def test_the_beginning_of_the_text(text_file, tokenizer) -> None:
    source = find_text(str(text_file))
    batches = list(text_batches(source, tokenizer, sequence=50, tokens=5000))
    expected = tokenizer(text_file.read_text()[:40_000], add_special_tokens=False)["input_ids"]
    assert sum(int(b["attention_mask"].sum()) for b in batches) == 5000
    assert flat(batches)[:256] == expected[:256]
    assert all(b["input_ids"].shape == b["attention_mask"].shape and b["input_ids"].shape[1] <= 50 for b in batches)
    sizes = [int(b["attention_mask"].sum()) for b in batches]
    assert all(BATCH <= size < BATCH + 50 for size in sizes[:-1]) and len(sizes) == 3


def test_a_short_text_gives_what_it_has(tmp_path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("the cat sees the river.")
    (tmp_path / "b.txt").write_text("a dog")
    (batch,) = text_batches(find_text(str(tmp_path)), tokenizer, sequence=32, tokens=10_000)
    mask = batch["attention_mask"]
    assert mask.shape[0] == 2 and mask[0].sum() > mask[1].sum() > 0
    assert torch.equal(mask, mask.sort(1, descending=True).values)
    assert not batch["input_ids"][mask == 0].any()


def test_special_tokens_as_the_tokenizer_puts_them(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[U]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, unk_token="[U]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    core.enable_truncation(3)  # a saved tokenizer may cut; that is not asked here
    (tmp_path / "t.txt").write_text("a b a b a")
    source = find_text(str(tmp_path / "t.txt"))
    (batch,) = text_batches(source, PreTrainedTokenizerFast(tokenizer_object=core), sequence=5, tokens=100)
    assert batch["input_ids"].tolist() == [[1, 3, 4, 3, 2], [1, 4, 3, 2, 0]]
    with pytest.raises(DataError, match="no room beside 2 special tokens"):
        list(text_batches(source, PreTrainedTokenizerFast(tokenizer_object=core), sequence=2, tokens=100))
