from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fastffn.data import files
from fastffn.data.files import file_pieces
from fastffn.errors import DataError


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zst}


def read(path: Path, column: str = "text", separator: str | None = "<|endoftext|>", size: int = 1000):
    return list(file_pieces(path, column, separator, size, lambda position: None))


def refused(path: Path, words: str, **settings) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(path, **settings)
    assert str(path) in str(caught.value)


def many_lines() -> bytes:
    """Does not compress to nothing, so that it can be cut off in the middle."""
    return "".join(f"{(i * 2654435761) % 2**32:x} äöü 漢字\n" for i in range(20_000)).encode()


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize("name", ["a.txt", "a.MD", "a.jsonl", "a.ndjson"])
def test_formats(tmp_path, name, packed) -> None:
    data = "first\n<|endoftext|>\nsecond ö\n".encode()
    expected = [("first", True), ("second ö\n", True)]
    if "j" in name:
        data = b'{"text": "first", "n": 1}\n\n{"n": 2, "text": "second \\u00f6\\n"}\n{"text": null}\n{"text": " "}\n'
    path = tmp_path / (name + packed)
    path.write_bytes(PACK[packed](data) if packed else data)
    assert read(path) == expected
    assert read(path, size=6)[0] == ("first", True)


def test_parquet(tmp_path) -> None:
    texts = [f"document {i}" if i % 7 else None for i in range(500)]
    table = pyarrow.table({"text": texts, "other": [str(i) for i in range(500)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=90)
    assert [piece.text for piece in read(tmp_path / "a.parquet")] == [text for text in texts if text]
    assert read(tmp_path / "a.parquet", column="other")[499] == ("499", True)
    positions = []
    list(file_pieces(tmp_path / "a.parquet", "text", None, 1000, positions.append))
    assert positions == sorted(positions)
    assert positions[-1] == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize("packed", PACK)
def test_packed_in_several_parts(tmp_path, packed) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed](b"first part, ") + PACK[packed](b"second part"))
    assert read(path) == [("first part, second part", True)]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99999])
def test_cut_off(tmp_path, packed, part) -> None:
    whole = PACK[packed](many_lines())
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(whole[: int(part * len(whole))])
    refused(path, "is cut off")
    two = PACK[packed](b"first part, ") + whole
    path.write_bytes(two[: len(two) - 9])
    refused(path, "is cut off")


@pytest.mark.parametrize("packed", PACK)
def test_not_packed_at_all(tmp_path, packed) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(b"plain text " * 100)
    refused(path, rf"no intact \{packed} file")


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize("chunk", [3, 2**20])
def test_not_utf8(tmp_path, monkeypatch, packed, chunk) -> None:
    monkeypatch.setattr(files, "_CHUNK", chunk)
    unpacked = " of what it unpacks to" if packed else " is"
    for data, message in {
        "漢字 über".encode() + b"\xfc": "byte 0xfc at byte 12",
        b"abc\xe6\xbc": "byte 0xe6 at byte 3",
        b"\xe6\xbc\xa2\xe6\xbcx": "byte 0xe6 at byte 3",
        b"\xff\xfeabc": "byte 0xff at byte 0",
    }.items():
        for name in ("a.txt", "a.jsonl"):
            path = tmp_path / (name + packed)
            path.write_bytes(PACK[packed](data) if packed else data)
            refused(path, f"not UTF-8 text: {message}{unpacked}")


def test_not_utf8_in_a_later_line(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\r\n\n{"text": "\xff"}\n')
    refused(path, f"byte 0xff at byte {path.read_bytes().index(255)} is")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_binary(tmp_path, monkeypatch, name) -> None:
    path = tmp_path / name
    # Also where the zero comes in a later chunk.
    for data, chunk in ((b"\x89PNG\r\n\x00\x01", 2**20), (b"fine\n\n\x00\x01", 4)):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        refused(path, "is a binary file, .* a zero at byte 6")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(files, "_CHUNK", 1)
    text = "first" if name == "a.txt" else '{"text": "first"}'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read(tmp_path / name) == [("first", True)]


def test_what_is_wrong_in_json_lines(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "good"}) + "\n"
    for line, message in {
        '{"text": "cut o': "line 3: not a JSON object",
        '["text"]': "line 3: list where a JSON object",
        '{"body": "x", "title": "y"}': "line 3: no text in a column 'text'; there is body, title",
        '{"text": 3}': "line 3: column 'text' holds no text but int",
        '{"text": "\\ud83d alone"}': r"line 3: half of a character, \\ud83d",
        "[" * 100_000: "line 3: not a JSON object",
    }.items():
        path.write_text(good + "\n" + line)
        refused(path, message)
    path.write_text(json.dumps({"text": "\U0001f642 \\u"}))
    assert read(path) == [("\U0001f642 \\u", True)]


def test_what_is_wrong_in_parquet(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2], "body": ["x", "y"]}), path)
    refused(path, "row 1: column 'text' holds no text but int")
    refused(path, "no text in a column 'story'; there is text, body", column="story")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    refused(path, "cannot be read as Parquet")
    path.write_bytes(b"")
    refused(path, "cannot be read as Parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(whole))
    refused(tmp_path / "a.parquet.gz", "Unpack the .gz")
    # Declared as text, and none.
    broken = pyarrow.StringArray.from_buffers(2, *pyarrow.array([b"fine", b"\xff"]).buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), path)
    refused(path, "rows from 1 on is not UTF-8")


def test_too_long_for_one_value(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "VALUE_LIMIT", 2**20)
    path = tmp_path / "a.jsonl"
    fits = json.dumps({"text": "x" * (2**20 - 12)})
    assert len(fits) == 2**20
    path.write_text(f"{fits}\n{fits}\n")
    assert "".join(piece.text for piece in read(path)) == 2 * "x" * (2**20 - 12)
    # With its end, and one whose end is not even looked for.
    for length in (2**20 + 1, 5 * 2**20):
        path.write_text(f"{fits}\n{'x' * length}\n{fits}")
        positions: list[int] = []
        with pytest.raises(DataError, match="line 2: a document of more than 1 MiB"):
            list(file_pieces(path, "text", None, 1000, positions.append))
        assert positions[-1] <= 4 * 2**20
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "x" * (2**20 + 1)]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "row 2: a document of more than 1 MiB")


@pytest.mark.parametrize("blanks", [True, False])
def test_one_long_line(tmp_path, blanks) -> None:
    path = tmp_path / "a.txt"
    text = "word " * 600_000 if blanks else "x" * 3_000_000
    path.write_text(text)
    pieces = read(path)
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) <= 1000
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert not blanks or all(piece.text.startswith(" word") for piece in pieces[1:])


@pytest.mark.slow
def test_a_line_of_a_gigabyte_takes_little_memory(tmp_path) -> None:
    path = tmp_path / "a.txt"
    block = b"word " * 209_715 + b"x"  # 2**20 bytes
    with path.open("wb") as file:
        for _ in range(1024):
            file.write(block)
    code = (
        "import resource, sys\n"
        "from fastffn.data.text import find_text\n"
        "source = find_text(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "characters = longest = ends = 0\n"
        "for piece in source.pieces():\n"
        "    characters += len(piece.text); longest = max(longest, len(piece.text)); ends += piece.ends_document\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(characters, longest, ends, after - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    characters, longest, ends, grown = map(int, done.stdout.split())
    assert characters == 2**30
    assert longest <= 16_384
    assert ends == 1
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 32 * 2**20
