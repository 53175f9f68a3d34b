from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastffn.data.pieces import pieces_of, split_documents


def documents(pieces) -> list[str]:
    found, current = [], ""
    for piece in pieces:
        current += piece.text
        if piece.ends_document:
            found.append(current)
            current = ""
    assert current == "", "the last document does not end"
    return found


def by_lines(text: str, separator: str) -> list[str]:
    """The same by the plainest means."""
    found, current = [], []
    for line in text.split("\n"):
        if re.fullmatch(r"[ \t]*\r?" if separator == "blank" else re.escape(separator) + r"\r?", line):
            found.append("\n".join(current).removesuffix("\r"))
            current = []
        else:
            current.append(line)
    found.append("\n".join(current))
    return [document for document in found if document.strip()]


def in_stretches(text: str, length: int):
    return iter([text[start : start + length] for start in range(0, len(text), length)])


PARTS = [
    "a",
    "bc ",
    " ",
    "\n",
    "\r\n",
    "\t",
    "== next ==",
    "\n== next ==\n",
    "\r\n== next ==\r\n",
    "x== next ==",
    "ö" * 30,
]


@given(
    st.lists(st.sampled_from(PARTS), max_size=40).map("".join),
    st.sampled_from(["== next ==", "blank"]),
    st.sampled_from([1, 2, 3, 7, 50, 10_000]),
    st.sampled_from([8, 20, 10_000]),
)
@example("aabc \r\n\r\n\r\n\r\n", "== next ==", 1, 8)
def test_documents_are_those_of_the_lines(text, separator, stretch, size) -> None:
    pieces = list(split_documents(in_stretches(text, stretch), separator, size))
    found, expected = documents(pieces), by_lines(text, separator)
    assert all(len(piece.text) <= size for piece in pieces)
    if size > len(text):
        assert found == expected
    # White space that fills a piece may be left out where a document begins.
    assert [document.strip() for document in found] == [document.strip() for document in expected]


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=40).map("".join), st.sampled_from([1, 5, 1000]))
def test_without_a_separator_all_is_one_document(text, stretch) -> None:
    for separator in (None, ""):
        found = documents(split_documents(in_stretches(text, stretch), separator, 10_000))
        assert found == ([text] if text.strip() else [])


@pytest.mark.parametrize("length", range(1, 40))
@pytest.mark.parametrize("rest", [" ", "\t\r", "   \n"])
def test_a_document_ends_even_if_only_white_space_is_left(length, rest) -> None:
    text = "x" * length + rest + "\n--\nnext"
    assert documents(split_documents(in_stretches(text, 100), "--", 8)) == by_lines(text, "--")
    assert documents(split_documents(in_stretches(text, length + len(rest)), "--", 8)) == by_lines(text, "--")


def test_a_separator_is_a_whole_line() -> None:
    text = "one\n<|endoftext|>\n<|endoftext|>\n \nx <|endoftext|>\n<|endoftext|> y\n<|endoftext|>\nlast\n"
    found = list(split_documents(iter([text]), "<|endoftext|>", 100))
    assert found == [("one", True), (" \nx <|endoftext|>\n<|endoftext|> y", True), ("last\n", True)]


def test_cut_before_the_white_space() -> None:
    words = " ".join(f"word{i}" for i in range(100))
    pieces = list(pieces_of(words, 50))
    assert "".join(piece.text for piece in pieces) == words
    assert all(re.fullmatch(r" ?word\d+( word\d+)*", piece.text) for piece in pieces)
    # A line end goes before a space.
    assert [piece.text for piece in pieces_of("aaaaa\n\nbbb cccc", 10)] == ["aaaaa", "\n\nbbb cccc"]
    assert [piece.text for piece in pieces_of("x" * 25, 10)] == ["x" * 10, "x" * 10, "x" * 5]


@pytest.mark.parametrize("text", ["", " \n\t ", "\u2003" * 50])
def test_white_space_is_no_document(text) -> None:
    assert list(pieces_of(text, 10)) == []
    assert list(split_documents(iter([text]), None, 10)) == []


def test_cuts_do_not_change_the_tokens(data_dir) -> None:
    """Those of GPT-2, on real text."""
    from fastffn.data.text import find_text
    from fastffn.data.tokenise import plain_backend
    from fastffn.data.tokenizer import load_tokenizer

    tokenizer = plain_backend(load_tokenizer(str(data_dir / "gpt2-tokenizer")))
    whole = documents(find_text(str(data_dir / "corpus" / "valid.txt.xz")).pieces())
    assert len(whole) == 396
    for text in whole[:40]:
        cut = [id for piece in pieces_of(text, 500) for id in tokenizer.encode(piece.text).ids]
        assert cut == tokenizer.encode(text).ids
