"""Where documents come from: one file per kind, each with `find(path)` -> files and `read(file, ...)` -> documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hildanext.config import SourceConfig
from hildanext.data.documents import Document, Rejects
from hildanext.data.sources import dolma, instruct, pretokenized, self_answers, tinystories
from hildanext.data.sources.opening import File

# What stands for the one file of a source that has none: synthetic stories.
SYNTHETIC = "synthetic"
SYNTHETIC_BYTES = 500  # of a story, about


def find_files(source: SourceConfig, data: str) -> list[File]:
    """The files a source reads, sorted. Raises UsageError, DataError or UnreachableError naming the path.

    data: `paths.data`, where the texts of 'self' are.
    """
    if source.path is None:
        return [File(SYNTHETIC, SYNTHETIC_BYTES * source.documents)]
    if source.kind == "self":
        return self_answers.find(self_answers.written_file(data, source))
    room = {"dolma": dolma, "instruct": instruct, "pretokenized": pretokenized, "tinystories": tinystories}[source.kind]
    return room.find(source.path)


def read_file(source: SourceConfig, path: str, seed: int, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """(number, document) of one file of a source; numbers go up. What cannot be used is counted in `rejects`.

    `seed` is for synthetic stories. Raises OSError or UnreachableError for a file that cannot be read.
    """
    if source.path is None:
        return tinystories.made_up(source.documents, seed)
    if source.kind == "pretokenized":
        return pretokenized.read(path, source.dtype, rejects)
    if source.kind == "dolma":
        return dolma.read(path, rejects)
    if source.kind == "instruct":
        return instruct.read(path, rejects)
    if source.kind == "self":
        return self_answers.read(path, source.cut_repeats, rejects)
    return tinystories.read(path, rejects)


def read_source(source: SourceConfig, files: list[File], seed: int, rejects: Rejects) -> Iterator[Document]:
    """At most `max_documents` documents of a source, file by file."""
    documents = (doc for file in files for _, doc in read_file(source, file.path, seed, rejects))
    return islice(documents, source.max_documents)
