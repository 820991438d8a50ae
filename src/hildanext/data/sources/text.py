"""A column of text: of parquet and Arrow files, of JSON lines and arrays; and plain text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from hildanext.data.documents import Document, Rejects, check_text
from hildanext.data.sources import json_records
from hildanext.data.sources.lines import MAX_RECORD_BYTES, DamagedError, read_pieces, read_records
from hildanext.data.sources.opening import TABLES, File, file_name, is_table, list_files
from hildanext.errors import DataError, UsageError

PLAIN = (".txt", ".txt.gz", ".txt.zst")
SUFFIXES = (*PLAIN, *json_records.SUFFIXES, *TABLES)
SEPARATOR = b"<|endoftext|>"
ASKED_RECORDS = 100  # JSON records that are searched for a column before a file is read
MOST_NAMES = 40  # columns that a message lists


def find(path: str, column: str) -> list[File]:
    """The text files at `path`. Raises UsageError, with the columns there are, if the first table or JSON file has no
    `column`; a later file without it is counted as rejects.
    """
    files = list_files(path, SUFFIXES)
    first = next((file.path for file in files if not file_name(file.path).endswith(PLAIN)), None)
    if first is not None and (reason := _missing(first, column)) is not None:
        raise UsageError(f"data.sources: {first}: {reason}; set 'column' of the source")
    return files


def read(path: str, column: str, rejects: Rejects, source: str | None = None) -> Iterator[tuple[int, Document]]:
    """Yield (number, document) from one file: the values of `column` in order, or the texts of a plain text file.

    A document's id is the file name and its row or line. source: of the documents; None is the file's name.
    """
    name = file_name(path)
    origin = name.split(".")[0] if source is None else source
    last = 0
    for number, value in _values(path, column, rejects):
        try:
            text = _text_of(value, column)
        except UnicodeDecodeError:
            rejects.add("invalid UTF-8", path, number)
            continue
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        last = max(last + 1, number)  # numbers increase even if texts share a line
        yield last, Document(id=f"{name}:{number}", source=origin, text=text)


def _text_of(value: object, column: str) -> str:
    """A value as text. Raises DataError for one that is not text, UnicodeDecodeError for bytes that are not UTF-8."""
    if value is None:
        raise DataError(f"no '{column}'")
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str):
        raise DataError(f"'{column}' is not text")
    return check_text(value)


def _values(path: str, column: str, rejects: Rejects) -> Iterator[tuple[int, object]]:
    """Yield (row or line, value)."""
    if file_name(path).endswith(PLAIN):
        yield from _from_plain(path, rejects)
        return
    if is_table(path):
        from hildanext.data.sources import tables  # imports pyarrow, which is slow

        records = tables.read_rows(path, lambda schema: [tables.part_of(schema, column)], rejects)
    else:
        records = json_records.read_json(path, rejects)
    for number, record in records:
        yield number, _value_at(record, column)[0]


def _value_at(record: Mapping[str, Any], column: str) -> tuple[Any, bool | None]:
    """The value at a path such as 'meta.text' or 'pages.0.text', and whether the path exists; None: it ends at a null.

    A key that contains the dots itself comes first.
    """
    if column in record:
        return record[column], True
    value: Any = record
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return None, None if value is None else False
    return value, True


def _missing(path: str, column: str) -> str | None:
    """Why a file has no text at `column`, with the names it has; None if it has, or is damaged or empty."""
    if is_table(path):
        from hildanext.data.sources import tables

        schema = tables.read_schema(path)
        try:
            if schema is not None:
                tables.part_of(schema, column)
        except DataError as error:
            return f"{error}; the columns are {_listed(tables.paths(schema))}"
        return None
    records = [record for _, record in islice(json_records.read_json(path, Rejects()), ASKED_RECORDS)]
    found = {_value_at(record, column)[1] for record in records}
    if True in found or False not in found:
        return None
    return f"no '{column}' in its records; the keys are {_listed(name for record in records for name in record)}"


def _listed(names: Iterable[str]) -> str:
    """Names without repetition, the first ones of many."""
    found = list(dict.fromkeys(names))
    return ", ".join(found[:MOST_NAMES]) + (", ..." if len(found) > MOST_NAMES else "")


def _from_plain(path: str, rejects: Rejects) -> Iterator[tuple[int, object]]:
    """Yield (first line, text) from a text file, split at '<|endoftext|>' or, in a file without it, at blank lines."""
    raw = _between_marks(path, rejects) if _has_marks(path) else _between_blank_lines(path, rejects)
    for number, text in raw:
        try:
            yield number, text.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            rejects.add("invalid UTF-8", path, number)


def _has_marks(path: str) -> bool:
    tail = b""
    try:
        for piece in read_pieces(path):
            tail += piece
            if SEPARATOR in tail:
                return True
            tail = tail[-len(SEPARATOR) :]
    except DamagedError:
        pass  # the reader meets the damage again and counts it
    return False


def _between_marks(path: str, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    line = 1
    for _, text in read_records(path, SEPARATOR, rejects):
        begin = len(text) - len(text.lstrip())
        # A mark at the start or end of the file gives an empty piece, which is skipped.
        if begin < len(text):
            yield line + text.count(b"\n", 0, begin), text
        line += text.count(b"\n")


def _between_blank_lines(path: str, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    lines: list[bytes] = []
    first, size = 0, 0
    for number, line in read_records(path, b"\n", rejects):
        if not line or line.isspace():
            if lines:
                yield first, b"\n".join(lines)
            lines, size = [], 0
            continue
        first = number if size == 0 else first
        size += len(line)
        if size > MAX_RECORD_BYTES and lines:
            rejects.add(f"more than {MAX_RECORD_BYTES >> 20} MiB without a blank line or '<|endoftext|>'", path, first)
            lines = []
        elif size <= MAX_RECORD_BYTES:
            lines.append(line.rstrip(b"\r"))
    if lines:
        yield first, b"\n".join(lines)
