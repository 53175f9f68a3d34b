from __future__ import annotations

import os
import warnings

import datasets
import pytest

from fastffn.data.python_docs import python_docs
from fastffn.data.text import find_text
from fastffn.errors import DataError


def text_of(source) -> str:
    return "".join(piece.text for piece in source.pieces())


def test_python_docs_are_there_and_the_same_every_time() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        python_docs.cache_clear()
        documents = python_docs()
    assert sum(map(len, documents)) > 1_000_000
    assert len(documents) > 300
    python_docs.cache_clear()
    assert python_docs() == documents
    assert text_of(find_text("python-docs")) == "".join(documents)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_is_read_as_it_is(tmp_path, newline) -> None:
    text = newline.join(f"line {i} äöü 漢字 🙂" for i in range(5000)) + newline
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(find_text(str(path)).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 40
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces)


def test_one_long_line_comes_in_pieces(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 300_000)
    pieces = list(find_text(str(path)).pieces())
    assert "".join(piece.text for piece in pieces) == "x" * 300_000
    assert max(len(piece.text) for piece in pieces) <= 10_000


def test_a_byte_order_mark_is_no_text(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first line\n", encoding="utf-8-sig")
    assert list(find_text(str(path)).pieces()) == [("first line\n", True)]


def test_a_folder_in_order_and_only_text(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.md").write_text("first\n")
    (tmp_path / "sub" / "c.TXT").write_text("third\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    source = find_text(str(tmp_path))
    assert list(source.pieces()) == [("first\n", True), ("second\n", True), ("third\n", True)]


def test_a_change_changes_the_identity(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = find_text(str(path)).identity
    assert find_text(str(path)).identity == before
    os.utime(path, ns=(1, 1))
    assert find_text(str(path)).identity != before


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ["first", "second"], "other": ["x", "y"], "number": [1, 2]})


def test_a_saved_data_set(tmp_path, rows) -> None:
    rows.save_to_disk(tmp_path / "one")
    assert list(find_text(str(tmp_path / "one")).pieces()) == [("first", True), ("second", True)]
    assert text_of(find_text(str(tmp_path / "one"), column="other")) == "xy"
    both = datasets.DatasetDict({"train": rows, "validation": rows.select([1])})
    both.save_to_disk(tmp_path / "two")
    assert text_of(find_text(str(tmp_path / "two"))) == "firstsecond"
    assert text_of(find_text(str(tmp_path / "two"), split="validation")) == "second"


def test_a_data_set_by_name(tmp_path, rows, monkeypatch) -> None:
    asked = []

    def load(name, configuration):
        asked.append((name, configuration))
        return datasets.DatasetDict({"train": rows})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert text_of(find_text("wikitext:wikitext-2-raw-v1")) == "firstsecond"
    assert asked[0] == ("wikitext", "wikitext-2-raw-v1")
    assert text_of(find_text("owner/name")) == "firstsecond"
    assert asked[-1] == ("owner/name", None)


def refused(data: str, words: str, **settings) -> None:
    with pytest.raises(DataError, match=words):
        list(find_text(data, **settings).pieces())


def test_what_is_refused(tmp_path, rows) -> None:
    refused(str(tmp_path / "missing.txt"), "does not exist")
    refused("missing.txt", "does not exist")
    refused("./missing", "does not exist")
    refused(str(tmp_path), "holds no text files")
    (tmp_path / "empty.txt").touch()
    refused(str(tmp_path / "empty.txt"), "is empty")
    refused(str(tmp_path), "is empty")
    (tmp_path / "latin1.txt").write_bytes("über".encode("latin-1"))
    refused(str(tmp_path / "latin1.txt"), "not UTF-8 text: byte 0xfc")
    rows.save_to_disk(tmp_path / "rows")
    refused(str(tmp_path / "rows"), "--text-column", column="body")
    refused(str(tmp_path / "rows"), "--text-column", column="number")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "split")
    refused(str(tmp_path / "split"), "has no split 'test'", split="test")
    # Not a file, and (offline) not a data set either.
    refused("nobody/nothing", "cannot be loaded as a data set")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("secret")
    path.chmod(0)
    refused(str(path), "cannot be read")
