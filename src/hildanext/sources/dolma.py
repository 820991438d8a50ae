"""Dolma: a tree of JSON lines with 'text'. Folders named 'attributes' hold labels, not documents, and are left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hildanext.documents import Document, Rejects, check_text
from hildanext.errors import DataError
from hildanext.sources.lines import list_files, read_json_lines

SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


def find(path: str) -> list[Path]:
    """The document files below `path`."""
    return list_files(path, SUFFIXES, without="attributes")


def read(path: Path, rejects: Rejects) -> Iterator[Document]:
    """Documents of one file; 'id' and 'source' are kept where the record has them."""
    for number, record in read_json_lines(path, rejects):
        try:
            text = check_text(record.get("text"))
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        yield Document(
            id=str(record.get("id") or f"{path.name}:{number}"), source=str(record.get("source") or "dolma"), text=text
        )
