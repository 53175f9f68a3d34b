from __future__ import annotations

import gzip
import os
import shutil
import warnings

import datasets
import pytest

from fastffn.data.python_docs import python_docs
from fastffn.data.text import find_text
from fastffn.errors import ConfigError, DataError


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
    assert sum(piece.ends_document for piece in find_text("python-docs").pieces()) == len(documents)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_is_read_as_it_is(tmp_path, newline) -> None:
    text = newline.join(f"line {i} äöü 漢字 🙂" for i in range(5000)) + newline
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(find_text(str(path)).pieces())
    assert "".join(piece.text for piece in pieces) == text
    # Enough of them for a part held out to be spread over the whole.
    assert len(pieces) > 100
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.startswith(newline) for piece in pieces[1:])


def test_a_folder_in_order_of_paths_whatever_the_formats(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.md").write_text("first\n")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n{"text": "fourth"}\n')
    (tmp_path / "sub" / "d.TXT.gz").write_bytes(gzip.compress(b"fifth\n"))
    datasets.Dataset.from_dict({"text": ["sixth"]}).to_parquet(tmp_path / "sub" / "e.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "e.parquet.gz").write_bytes(b"not read")
    expected = ["first\n", "second\n", "third", "fourth", "fifth\n", "sixth"]
    source = find_text(str(tmp_path))
    assert list(source.pieces()) == [(text, True) for text in expected]
    assert list(find_text(f"{tmp_path}/**").pieces()) == list(source.pieces())
    assert list(find_text(f"{tmp_path}/*.[mt]*").pieces()) == [("first\n", True), ("second\n", True)]
    # What exists is no pattern.
    (tmp_path / "[x].txt").write_text("itself")
    assert list(find_text(f"{tmp_path}/[x].txt").pieces()) == [("itself", True)]


def test_a_file_named_by_itself_may_have_any_suffix(tmp_path) -> None:
    (tmp_path / "wiki.train.tokens").write_text("text\n")
    assert list(find_text(str(tmp_path / "wiki.train.tokens")).pieces()) == [("text\n", True)]


def test_what_has_been_read_is_reported(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("x" * 3_000_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"y" * 3_000_000))
    source = find_text(str(tmp_path))
    positions = []
    list(source.pieces(positions.append))
    assert positions == sorted(positions)
    assert len(positions) > 5
    assert positions[-1] == source.size == 3_000_000 + (tmp_path / "b.txt.gz").stat().st_size


def test_the_separator_of_documents(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n\nthree\n")

    def texts(**settings) -> list[str]:
        return [piece.text for piece in find_text(str(tmp_path / "a.txt"), **settings).pieces() if piece.ends_document]

    assert texts() == ["one", "two\n\nthree\n"]
    assert texts(separator="blank") == ["one\n<|endoftext|>\ntwo", "three"]
    assert texts(separator="") == texts(separator=None) == ["one\n<|endoftext|>\ntwo\n\nthree\n"]
    for separator in ("a\nb", " ", "\r"):
        with pytest.raises(ConfigError, match="document_separator"):
            texts(separator=separator)


def test_a_change_changes_the_identity(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = find_text(str(path)).identity
    os.utime(path, ns=(1, 1))
    assert find_text(str(path)).identity == before
    path.write_text("two")
    assert find_text(str(path)).identity != before
    # What reads it goes by the suffix.
    shutil.copy(path, tmp_path / "a.csv")
    assert find_text(str(tmp_path / "a.csv")).identity != find_text(str(path)).identity


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


def refused(data: str, words: str, **settings) -> None:
    with pytest.raises(DataError, match=words):
        list(find_text(data, **settings).pieces())


def test_what_is_refused(tmp_path, rows) -> None:
    refused(str(tmp_path / "missing.txt"), "does not exist")
    refused("missing.txt", "does not exist")
    refused("missing.jsonl.zst", "does not exist")
    refused("./missing", "does not exist")
    refused("no/such/folder", "does not exist")
    refused(str(tmp_path / "sub") + "/", "does not exist")
    refused(str(tmp_path), "holds no text files.*no files at all")
    refused(f"{tmp_path}/*.txt", "holds no text files.*no files at all")
    (tmp_path / "table.csv.gz").write_bytes(b"x")
    refused(str(tmp_path), r"looked for \.txt.*there are only \.csv\.gz")
    refused(f"{tmp_path}/*", r"there are only \.csv\.gz")
    (tmp_path / "corpus.txt").write_text("text")
    refused(str(tmp_path / "corpsu.txt"), r"Did you mean 'corpus\.txt'")
    (tmp_path / "corpus.txt").unlink()
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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("secret")
    path.chmod(0)
    refused(str(path), "cannot be read")
