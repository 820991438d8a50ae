"""Dolma: a tree of JSON lines files with 'text'. Folders named 'attributes' hold labels and are ignored."""

from __future__ import annotations

from collections.abc import Iterator

from hildanext.data.documents import Document, Rejects, check_text
from hildanext.data.sources.lines import read_json_lines
from hildanext.data.sources.opening import File, file_name, list_files
from hildanext.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


def find(path: str) -> list[File]:
    """The document files at `path`."""
    return list_files(path, SUFFIXES, without="attributes")


def read(path: str, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (line, document) from one file. Keeps the record's 'id' and 'source' if present."""
    for number, record in read_json_lines(path, rejects):
        try:
            text = check_text(record.get("text"))
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        name = str(record.get("id") or f"{file_name(path)}:{number}")
        yield number, Document(id=name, source=str(record.get("source") or "dolma"), text=text)
