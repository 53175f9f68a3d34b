from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch

from fastffn.data import tokenise
from fastffn.data.blocks import collate, token_blocks
from fastffn.data.text import TextSource, find_text
from fastffn.data.tokenise import plain_backend
from fastffn.data.tokenizer import load_tokenizer
from fastffn.errors import DataError


def flat(rows) -> list[int]:
    return rows["input_ids"][:].flatten().tolist()


def token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token numbers of each text, without special tokens."""
    encodings = plain_backend(tokenizer).encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def expected_parts(pieces, tokenizer, every: int, by_documents: bool) -> dict[str, list[int]]:
    """Tokens of both parts, by the plainest means."""
    parts = {"train": [], "validation": []}
    number, before = 0, None
    for piece in pieces:
        name = "validation" if number % every == 0 else "train"
        if before is not None and before != name and parts[before][-1] != tokenizer.eos_token_id:
            parts[before].append(tokenizer.eos_token_id)
        parts[name] += token_ids(tokenizer, [piece.text])[0]
        if piece.ends_document:
            parts[name].append(tokenizer.eos_token_id)
        number += piece.ends_document or not by_documents
        before = name
    return parts


def documents_file(path, number: int) -> str:
    sentences = ("the cat sees the river.", "a dog follows a small house.", "no machine forgets.")
    documents = [" ".join([f"{n}:", *[sentences[(n * 7 + k) % 3] for k in range(5 + n % 40)]]) for n in range(number)]
    path.write_text("".join(f"{document}\n<|endoftext|>\n" for document in documents))
    return str(path)


@pytest.mark.parametrize("number", [1, 19, 20, 300])
def test_blocks_are_the_text(tmp_path, tokenizer, number, monkeypatch) -> None:
    if number == 300:
        # Many batches: nothing is lost or exchanged between them.
        monkeypatch.setattr(tokenise, "_BATCH_CHARACTERS", 1000)
        monkeypatch.setattr(tokenise, "_ROWS", 3)
    data = documents_file(tmp_path / "a.txt", number) if number > 1 else str(tmp_path / "a.txt")
    if number == 1:
        (tmp_path / "a.txt").write_text("the cat sees the river.\n" * 1000)
    found = token_blocks(data, tokenizer, 32, validation_fraction=0.1)
    assert all(len(row["input_ids"]) == 32 for row in found.train)
    pieces = list(find_text(data).pieces())
    assert found.held_out == ("documents" if number >= 20 else "stretches")
    expected = expected_parts(pieces, tokenizer, 10, number >= 20)
    for name, rows in (("train", found.train), ("validation", found.validation)):
        tokens = flat(rows)
        assert tokens == expected[name][: len(tokens)]
        assert len(expected[name]) - len(tokens) < 32
    assert found.train_characters + found.validation_characters == sum(len(piece.text) for piece in pieces)
    assert found.train_documents + found.validation_documents == number
    if number >= 20:
        assert found.validation_documents == number / 10


def test_held_out_documents_are_held_out_as_a_whole(tmp_path, tokenizer) -> None:
    found = token_blocks(documents_file(tmp_path / "a.txt", 200), tokenizer, 8)
    seen = {name: tokenizer.decode(flat(getattr(found, name))) for name in ("train", "validation")}
    for n in range(100, 199):  # of the last one, what fills no block is missing
        assert (f"{n}:" in seen["train"]) != (n % 20 == 0)
        assert (f"{n}:" in seen["validation"]) == (n % 20 == 0)


def test_documents_are_separated(tmp_path, tokenizer) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("the cat sees the river.\n" * 20)
    found = token_blocks(str(tmp_path), tokenizer, 8, validation=str(tmp_path / "a.txt"))
    assert found.held_out == "validation text"
    assert (found.train_documents, found.validation_documents) == (3, 1)
    assert found.train_characters == 3 * found.validation_characters == 3 * 24 * 20
    # The last one may be in what fills no block.
    assert flat(found.train).count(tokenizer.eos_token_id) in (2, 3)
    assert flat(found.validation).count(tokenizer.eos_token_id) in (0, 1)


def test_the_separator_is_the_users(tmp_path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("the cat sees the river.\n\n" * 200)
    found = {
        separator: token_blocks(str(tmp_path / "a.txt"), tokenizer, 8, separator=separator)
        for separator in ("", "blank")
    }
    assert found[""].train_documents + found[""].validation_documents == 1
    assert found["blank"].train_documents + found["blank"].validation_documents == 200
    assert (found[""].held_out, found["blank"].held_out) == ("stretches", "documents")
    assert found[""].identity != found["blank"].identity


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


def test_tokenised_once(text_file, tokenizer, monkeypatch) -> None:
    first = token_blocks(str(text_file), tokenizer, 24)
    assert first.seconds > 0
    made = (len(first.train) + len(first.validation)) * 24
    assert first.tokens_per_second == pytest.approx(made / first.seconds)

    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(TextSource, "pieces", fail)
    again = token_blocks(str(text_file), tokenizer, 24)
    assert (again.seconds, again.tokens_per_second) == (0.0, None)
    assert flat(again.train) == flat(first.train)
    assert again.identity == first.identity
    assert again.train_characters == first.train_characters > 10 * first.validation_characters
    assert again.validation_characters == first.validation_characters > 0
    assert again.train_documents == first.train_documents == 1
    assert again.validation_documents == first.validation_documents == 0
    for change in ({"block": 25}, {"validation_fraction": 0.1}, {"separator": "x"}):
        with pytest.raises((AssertionError, datasets.exceptions.DatasetGenerationError)):
            token_blocks(**{"data": str(text_file), "tokenizer": tokenizer, "block": 24, **change})


def test_text_that_was_moved_is_not_tokenised_again(text_file, tokenizer, tmp_path) -> None:
    first = token_blocks(str(text_file), tokenizer, 28)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "other.txt"
    shutil.copy(text_file, moved)
    again = token_blocks(str(moved), tokenizer, 28)
    assert (again.seconds, again.identity) == (0.0, first.identity)


def test_another_layout_is_not_reused(text_file, tokenizer, monkeypatch) -> None:
    from fastffn.data import cache

    first = token_blocks(str(text_file), tokenizer, 26)
    monkeypatch.setattr(cache, "LAYOUT_VERSION", cache.LAYOUT_VERSION + 1)
    again = token_blocks(str(text_file), tokenizer, 26)
    assert again.seconds > 0
    assert again.identity != first.identity


# Run as processes of their own: argument 1 is the text, 2 the tokenizer, 3 what to do in the middle.
PROCESS = """
import os, sys, time
from pathlib import Path
import fastffn.data.cache as cache
from fastffn.data.blocks import token_blocks
from fastffn.data.tokenizer import load_tokenizer

folder = Path(sys.argv[1]).parent
tables = cache.block_tables

def slowly(*arguments):
    for number, table in enumerate(tables(*arguments)):
        yield table
        if sys.argv[3] == "wait for the other" and number == 0:
            while len(list(folder.glob("here-*"))) < 2:
                time.sleep(0.05)
            time.sleep(1)
        if sys.argv[3] == "hang" and number == 2:
            (folder / "midway").touch()
            time.sleep(600)

cache.block_tables = slowly
tokenizer = load_tokenizer(sys.argv[2])
(folder / f"here-{os.getpid()}").touch()
blocks = token_blocks(sys.argv[1], tokenizer, 16)
print(blocks.seconds > 0, len(blocks.train), len(blocks.validation), blocks.identity)
"""


@pytest.fixture
def start(tmp_path, tokenizer):
    """Starts a process that makes blocks in a cache of its own."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = documents_file(tmp_path / "a.txt", 500)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    running = []

    def start_one(meanwhile: str) -> subprocess.Popen:
        command = [sys.executable, "-c", PROCESS, data, str(tmp_path / "tokenizer"), meanwhile]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
        return running[-1]

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


def results_of(process: subprocess.Popen) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split()


def test_of_two_processes_one_does_the_work(start) -> None:
    both = [start("wait for the other"), start("wait for the other")]
    (one, *rest), (two, *same) = map(results_of, both)
    assert {one, two} == {"True", "False"}
    assert rest == same


def test_what_a_killed_process_leaves_is_not_used(start, tmp_path, tokenizer, monkeypatch) -> None:
    process = start("hang")
    while not (tmp_path / "midway").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert list((tmp_path / "cache").rglob("*.incomplete"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    again = token_blocks(str(tmp_path / "a.txt"), tokenizer, 16)
    assert again.seconds > 0
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    undisturbed = token_blocks(str(tmp_path / "a.txt"), tokenizer, 16)
    assert flat(again.train) == flat(undisturbed.train)
    assert flat(again.validation) == flat(undisturbed.validation)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_cache_that_cannot_be_written(text_file, tmp_path, tokenizer, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot be written into .*HF_DATASETS_CACHE"):
        token_blocks(str(text_file), tokenizer, 16)


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


@pytest.mark.parametrize("make", [list, np.array])
def test_collate(make) -> None:
    batch = collate([{"input_ids": make([1, 2])}, {"input_ids": make([3, 4])}])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    # Nothing predicts the first token; the Trainer must not count it.
    assert batch["labels"].tolist() == [[-100, 2], [-100, 4]]
    assert batch["input_ids"].dtype == torch.int64


def test_rows_are_arrays(text_file, tokenizer) -> None:
    """Lists of Python's numbers take six times as long to fetch."""
    for rows in vars(token_blocks(str(text_file), tokenizer, 16)).values():
        if isinstance(rows, datasets.Dataset):
            assert isinstance(rows[0]["input_ids"], np.ndarray)
            assert collate(rows.__getitems__([1, 0]))["input_ids"].tolist() == rows["input_ids"][:2][::-1].tolist()


def test_encoded_pieces(text_file, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenise, "_BATCH_CHARACTERS", 1000)
    pieces = list(find_text(str(text_file)).pieces())
    found = list(tokenise.encoded_pieces(tokenizer, iter(pieces)))
    assert [piece for piece, _ in found] == pieces
    assert [ids for _, ids in found] == token_ids(tokenizer, [piece.text for piece in pieces])


def test_the_counts_of_the_real_corpus(data_dir, tokenizer, tmp_path) -> None:
    """Documents and tokens are those that its README gives."""
    gpt2 = load_tokenizer(str(data_dir / "gpt2-tokenizer"))
    found = token_blocks(str(data_dir / "corpus" / "valid.txt.xz"), gpt2, 2)
    assert found.train_documents + found.validation_documents == 396
    # At most one token of each part fills no block.
    assert 0 <= 490_362 - 2 * (len(found.train) + len(found.validation)) <= 2
