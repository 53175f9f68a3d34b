"""Reading files: text, JSON lines and Parquet, compressed or not, in little memory; what cannot be read is named."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastffn.data.pieces import Piece, pieces_of, split_documents
from fastffn.errors import DataError

FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "json lines"),
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".xz", ".zst")
# A document in a line of JSON or a row of Parquet is in memory as a whole; the largest books have some ten megabytes.
VALUE_LIMIT = 256 * 2**20
_CHUNK = 2**20
_ROWS = 64

Report = Callable[[int], None]


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix that names the format and the one that names the compression, in lower case, either may be empty."""
    compression = path.suffix.lower()
    if compression not in COMPRESSIONS:
        return compression, ""
    return Path(path.stem).suffix.lower(), compression


def is_readable(path: Path) -> bool:
    """Whether the suffixes are those of a text that can be read."""
    kind, compression = suffixes(path)
    return kind in FORMATS and not (FORMATS[kind] == "parquet" and compression)


def describe_formats() -> str:
    """For messages."""
    return f"{', '.join(FORMATS)}, all but Parquet also with {', '.join(COMPRESSIONS)}"


def file_pieces(path: Path, column: str, separator: str | None, size: int, report: Report) -> Iterator[Piece]:
    """The documents of a file, in order.

    Args:
        path: read as the suffixes say, as text if they say nothing.
        column: the key or column that holds the text, in JSON lines and Parquet.
        separator: see `split_documents`, in text.
        size: characters in a piece, at most.
        report: is told how many bytes of the file have been read.

    Raises:
        DataError: the file cannot be read as what it claims to be; the message says where.
    """
    kind, compression = suffixes(path)
    what = FORMATS.get(kind, "text")
    if what == "parquet":
        if compression:
            raise DataError(f"{path}: Parquet compresses by itself and is read only so. Unpack the {compression}.")
        texts = _parquet_texts(path, column, report)
    elif what == "json lines":
        texts = _json_texts(path, column, _chunks(path, compression, report))
    else:
        yield from split_documents(_decoded(path, _chunks(path, compression, report)), separator, size)
        return
    for text in texts:
        yield from pieces_of(text, size)


def _chunks(path: Path, compression: str, report: Report) -> Iterator[bytes]:
    """The unpacked bytes, about a megabyte at a time."""
    position = 0
    try:
        with path.open("rb") as raw:
            if compression and not path.stat().st_size:
                raise EOFError
            stream = _unpacked(raw, compression)
            while chunk := stream.read(_CHUNK):
                if b"\0" in chunk:
                    raise DataError(
                        f"{path} is a binary file, not UTF-8 text: there is a zero at byte "
                        f"{position + chunk.index(0)}{' of what it unpacks to' if compression else ''}. Leave it out."
                    )
                position += len(chunk)
                report(raw.tell())
                yield chunk
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        # pyarrow says "Truncated" in a bare OSError, and gives no error number with what it finds corrupt.
        if isinstance(error, EOFError) or "Truncated" in str(error):
            reason = f"is cut off: the {compression} data ends in the middle (after {position} unpacked bytes)"
        elif isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        else:
            reason = f"is no intact {compression} file ({error}; {position} bytes could be unpacked)"
        raise DataError(f"{path} {reason}. Fetch or pack it again, or leave it out.") from error


def _unpacked(raw: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".xz":
        return lzma.LZMAFile(raw)
    if compression == ".zst":
        # The standard library has no zstd before Python 3.14; pyarrow comes with `datasets`.
        import pyarrow

        return pyarrow.CompressedInputStream(raw, "zstd")
    return raw


def _decoded(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    """The text without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    started = False
    for chunk in itertools.chain(chunks, [b""]):
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, position - kept) from error
        position += len(chunk)
        if text:
            yield text if started else text.removeprefix("\ufeff")
            started = True


def _not_utf8(path: Path, error: UnicodeDecodeError, position: int) -> DataError:
    unpacked = " of what it unpacks to" if suffixes(path)[1] else ""
    return DataError(
        f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at byte {position + error.start}{unpacked} "
        "is no part of a character. Convert it (for instance with iconv), or leave it out."
    )


def _lines(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The lines without their line breaks."""
    waiting: list[bytes] = []
    length = 0
    number = 1
    for chunk in itertools.chain(chunks, [b"\n"]):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            if waiting:
                line = b"".join([*waiting, line])
                waiting, length = [], 0
            if len(line) > VALUE_LIMIT:
                raise _too_long(f"{path}, line {number}")
            yield line
            number += 1
        waiting.append(rest)
        length += len(rest)
        if length > VALUE_LIMIT:
            raise _too_long(f"{path}, line {number}")


def _too_long(where: str) -> DataError:
    return DataError(
        f"{where}: a document of more than {VALUE_LIMIT // 2**20} MiB, the most that one may have in JSON lines and "
        "Parquet. Divide it, or give it as a text file, where it may be of any length."
    )


def _json_texts(path: Path, column: str, chunks: Iterator[bytes]) -> Iterator[str]:
    position = 0
    for number, line in enumerate(_lines(path, chunks), start=1):
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, position) from error
        position += len(line) + 1
        decoded = decoded.removeprefix("\ufeff") if number == 1 else decoded
        if not decoded or decoded.isspace():
            continue
        try:
            row = json.loads(decoded)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not a JSON object ({error}). Each line must be one.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {type(row).__name__} where a JSON object is expected.")
        if column not in row:
            raise no_column(f"{path}, line {number}", column, list(row))
        text = checked_text(row[column], column, f"{path}, line {number}")
        if "\\u" in decoded:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{path}, line {number}: half of a character, \\u{ord(text[error.start]):04x}, stands alone."
                ) from error
        yield text


def _parquet_texts(path: Path, column: str, report: Report) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffered, or a column is read for a whole row group, which may be gigabytes.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_CHUNK) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise no_column(str(path), column, names)
            rows, size, done = file.metadata.num_rows, path.stat().st_size, 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                for number, text in enumerate(batch.column(0).to_pylist(), start=done + 1):
                    yield checked_text(text, column, f"{path}, row {number}")
                done += len(batch)
                report(size * done // rows)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in the rows from {done + 1} on is not UTF-8 ({error}).") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path} cannot be read as Parquet; it is damaged, cut off or no Parquet: {reason}") from error


def checked_text(text: Any, column: str, where: str) -> str:
    """The text of a document; null is an empty one.

    Raises:
        DataError: it is no text, or too long.
    """
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: column '{column}' holds no text but {type(text).__name__}. Name another with --text-column."
        )
    if len(text) > VALUE_LIMIT:
        raise _too_long(where)
    return text


def no_column(where: str, column: str, columns: list[str]) -> DataError:
    """The error of a missing column."""
    return DataError(
        f"{where}: no text in a column '{column}'; there is {', '.join(columns) or 'none'}. Name the column with "
        "--text-column."
    )
