from __future__ import annotations

import datasets
import pytest
import torch

from fastffn.data import blocks as module
from fastffn.data.blocks import collate, token_blocks, token_ids
from fastffn.data.text import find_text
from fastffn.errors import DataError


def flat(rows) -> list[int]:
    return [token for row in rows for token in row["input_ids"]]


def test_blocks_are_the_text(text_file, tokenizer) -> None:
    found = token_blocks(str(text_file), tokenizer, 32, validation_fraction=0.1)
    assert all(len(row["input_ids"]) == 32 for row in found.train)
    pieces = list(find_text(str(text_file)).pieces())
    expected = {"train": [], "validation": []}
    for number, piece in enumerate(pieces):
        part = expected["validation" if number % 10 == 0 else "train"]
        part += token_ids(tokenizer, [piece.text])[0]
        if piece.ends_document:
            part.append(tokenizer.eos_token_id)
    for name, rows in (("train", found.train), ("validation", found.validation)):
        tokens = flat(rows)
        assert tokens == expected[name][: len(tokens)]
        assert len(expected[name]) - len(tokens) < 32
    characters = sum(len(piece.text) for piece in pieces)
    # What is left at the end fills no block and is not counted.
    assert characters - 600 < found.train_characters + found.validation_characters <= characters


def test_documents_are_separated(tmp_path, tokenizer) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("the cat sees the river.\n" * 20)
    found = token_blocks(str(tmp_path), tokenizer, 8, validation=str(tmp_path / "a.txt"))
    # The last one may be in what fills no block.
    assert flat(found.train).count(tokenizer.eos_token_id) in (2, 3)
    assert flat(found.validation).count(tokenizer.eos_token_id) in (0, 1)


def test_a_validation_split_is_used(tmp_path, tokenizer) -> None:
    rows = datasets.Dataset.from_dict({"text": ["the cat sees the river. " * 50] * 4})
    other = datasets.Dataset.from_dict({"text": ["no machine forgets. " * 50]})
    datasets.DatasetDict({"train": rows, "validation": other}).save_to_disk(tmp_path / "rows")
    found = token_blocks(str(tmp_path / "rows"), tokenizer, 16)
    assert "machine" in tokenizer.decode(flat(found.validation))
    assert "machine" not in tokenizer.decode(flat(found.train))


def test_the_validation_text_may_be_a_data_set_with_splits(tmp_path, text_file, tokenizer) -> None:
    train = datasets.Dataset.from_dict({"text": ["the cat sees the river. " * 50] * 4})
    other = datasets.Dataset.from_dict({"text": ["no machine forgets. " * 50]})
    datasets.DatasetDict({"train": train, "validation": other}).save_to_disk(tmp_path / "rows")
    found = token_blocks(str(text_file), tokenizer, 16, validation=str(tmp_path / "rows"))
    assert "machine" in tokenizer.decode(flat(found.validation))
    datasets.DatasetDict({"validation": train}).save_to_disk(tmp_path / "one")
    found = token_blocks(str(tmp_path / "one"), tokenizer, 16, validation_fraction=0.25)
    assert len(found.train) > 2 * len(found.validation)


def test_a_tokenizer_that_cuts_or_pads_does_neither_here(text_file, tokenizer) -> None:
    import copy

    expected = flat(token_blocks(str(text_file), tokenizer, 16).train)
    cutting = copy.deepcopy(tokenizer)
    cutting("the cat", truncation=True, max_length=2)
    cutting.backend_tokenizer.enable_padding(length=64)
    assert len(cutting.backend_tokenizer.encode("the cat sees the river").ids) == 64
    assert flat(token_blocks(str(text_file), cutting, 16).train) == expected
    assert token_ids(cutting, ["the cat sees the river"]) == token_ids(tokenizer, ["the cat sees the river"])


def test_tokenised_once(text_file, tokenizer, monkeypatch) -> None:
    first = token_blocks(str(text_file), tokenizer, 24)

    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(module.TextSource, "pieces", fail)
    again = token_blocks(str(text_file), tokenizer, 24)
    assert flat(again.train) == flat(first.train)
    assert again.train_characters == first.train_characters
    with pytest.raises((AssertionError, datasets.exceptions.DatasetGenerationError)):
        token_blocks(str(text_file), tokenizer, 25)


def test_a_changed_file_is_read_again(tmp_path, tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the cat sees the river.\n" * 400)
    before = flat(token_blocks(str(path), tokenizer, 16).train)
    path.write_text("a dog follows a small house.\n" * 400)
    assert flat(token_blocks(str(path), tokenizer, 16).train) != before


def test_too_little_text(tmp_path, tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the cat sees the river.\n")
    with pytest.raises(DataError, match="shorter than one block: it has fewer than 64 tokens"):
        token_blocks(str(path), tokenizer, 64)
    path.write_text("the cat sees the river.\n" * 1000)
    (tmp_path / "v.txt").write_text("short")
    with pytest.raises(DataError, match=r"validation text .*v\.txt"):
        token_blocks(str(path), tokenizer, 64, validation=str(tmp_path / "v.txt"))


def test_errors_in_the_text_come_through(tmp_path, tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 1000 + b"\xff\xfe" + b"fine\n" * 1000)
    with pytest.raises(DataError, match="byte 0xff"):
        token_blocks(str(path), tokenizer, 16)


def test_collate() -> None:
    batch = collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    # Nothing predicts the first token; the Trainer must not count it.
    assert batch["labels"].tolist() == [[-100, 2], [-100, 4]]
    assert batch["input_ids"].dtype == torch.int64
