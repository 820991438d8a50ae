"""Instruction data: JSON arrays, JSON lines and tables. Records may have any shape that `shapes` supports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hildanext.data.documents import Document, Rejects, check_depth
from hildanext.data.sources import json_records
from hildanext.data.sources.opening import TABLES, File, file_name, is_table, list_files
from hildanext.data.sources.shapes import CONTENT, KEYS, to_messages, to_tools
from hildanext.errors import DataError

if TYPE_CHECKING:
    import pyarrow

LABELS = ("id", "source")  # of a record; any type that can be written
SUFFIXES = (*json_records.SUFFIXES, *TABLES)


def find(path: str) -> list[File]:
    """The JSON files and tables at `path`."""
    return list_files(path, SUFFIXES)


def read(path: str, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (record number, conversation) from one file. Keeps the record's 'id' and 'source' if present."""
    number, held, reason = 0, 0, ""
    for number, record in read_records(path, rejects):
        unknown: set[str] = set()
        try:
            messages, tools = to_messages(record, unknown), to_tools(record)
        except DataError as error:
            reason, held = str(error), _held(record)
            rejects.add(reason, path, number)
            continue
        rejects.ignore(sorted(unknown), number)
        name = str(record.get("id") or f"{file_name(path)}:{number}")
        origin = str(record.get("source") or file_name(path).split(".")[0])
        yield number, Document(id=name, source=origin, messages=messages, tools=tools)
    if number == 1 and held > 1:  # the file is one object, which holds all its records
        rejects.add(reason, path, number, held - 1)


def _held(record: dict[str, Any]) -> int:
    """The records in an object like {"data": [{...}, ...]}, which some files are as a whole; otherwise 1."""
    if any(key in record for key in CONTENT):
        return 1
    lists = [value for value in record.values() if isinstance(value, list) and all(isinstance(x, dict) for x in value)]
    return max(1, sum(map(len, lists)))


def read_records(path: str, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, record) from a file that holds a JSON array, JSON lines or a table.

    Columns that no shape knows are not read; they are counted as ignored in every row.
    """
    if not is_table(path):
        yield from json_records.read_json(path, rejects)
        return
    from hildanext.data.sources import tables  # imports pyarrow, which is slow

    ignored: list[str] = []

    def known_columns(schema: pyarrow.Schema) -> list[str]:
        known = [name for name in schema.names if name in KEYS]
        if not known:
            raise DataError("unknown record shape")
        ignored.extend(name for name in schema.names if name not in KEYS)
        return known

    for number, row in tables.read_rows(path, known_columns, rejects):
        try:
            given = {name: value for name, value in row.items() if value is not None}
            record = {name: str(value) if name in LABELS else _plain(value) for name, value in given.items()}
            check_depth(record)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        rejects.ignore(ignored, number)
        yield number, record


def _plain(value: object) -> Any:
    """A value of a table as a JSON value. Raises DataError for one that JSON cannot hold, such as a date.

    A null field of a struct is left out: a table has it in every row as soon as one row has a value.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise DataError(f"a value of type {type(value).__name__}")
