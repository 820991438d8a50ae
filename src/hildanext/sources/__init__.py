"""Where documents come from: one file per kind, each with `find(path)` -> files and `read(file, ...)` -> documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from hildanext.config import SourceConfig
from hildanext.documents import Document, Rejects
from hildanext.sources import dolma, instruct, pretokenized, tinystories


def find_files(source: SourceConfig) -> list[Path]:
    """The files a source reads, sorted; none for synthetic stories. Raises UsageError or DataError naming the path."""
    if source.path is None:
        return []
    room = {"dolma": dolma, "instruct": instruct, "pretokenized": pretokenized, "tinystories": tinystories}[source.kind]
    return room.find(source.path)


def read_source(source: SourceConfig, files: list[Path], seed: int, rejects: Rejects) -> Iterator[Document]:
    """At most `max_documents` documents of a source, file by file; what cannot be used is counted in `rejects`.

    `seed` is for synthetic stories. Raises OSError for a file that cannot be opened.
    """
    return islice(_read_all(source, files, seed, rejects), source.max_documents)


def _read_all(source: SourceConfig, files: list[Path], seed: int, rejects: Rejects) -> Iterator[Document]:
    if source.path is None:
        yield from tinystories.made_up(source.documents, seed)
    for path in files:
        if source.kind == "pretokenized":
            yield from pretokenized.read(path, source.dtype, rejects)
        elif source.kind == "dolma":
            yield from dolma.read(path, rejects)
        elif source.kind == "instruct":
            yield from instruct.read(path, rejects)
        else:
            yield from tinystories.read(path, rejects)
