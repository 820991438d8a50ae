"""Sources of documents: one module per kind, each with `find(path)` -> files and `read(file, ...)` -> documents."""

from __future__ import annotations

from collections.abc import Iterator

from hildanext.config import SourceConfig
from hildanext.data.documents import Document, Rejects
from hildanext.data.sources import dolma, instruct, pretokenized, self_answers, text, tinystories
from hildanext.data.sources.opening import File

SYNTHETIC = "synthetic"  # the file name of synthetic stories, which have no file
SYNTHETIC_BYTES = 500  # of a story, approximately


def find_files(source: SourceConfig, data: str) -> list[File]:
    """The files of a source, sorted. Raises UsageError, DataError or UnreachableError naming the path.

    data: `paths.data`, the folder with the answers of 'self' sources.
    """
    if source.path is None:
        return [File(SYNTHETIC, SYNTHETIC_BYTES * source.documents)]
    if source.kind == "self":
        return self_answers.find(self_answers.written_file(data, source))
    if source.kind == "text":
        return text.find(source.path, source.column)
    kinds = {"dolma": dolma, "instruct": instruct, "pretokenized": pretokenized, "tinystories": tinystories}
    return kinds[source.kind].find(source.path)


def read_file(source: SourceConfig, path: str, seed: int, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (number, document) from one file of a source, with increasing numbers. Counts bad records in `rejects`.

    `seed` applies to synthetic stories. Raises OSError or UnreachableError for a file that cannot be read.
    """
    if source.path is None:
        return tinystories.read_synthetic(source.documents, seed)
    if source.kind == "pretokenized":
        return pretokenized.read(path, source.dtype, rejects)
    if source.kind == "dolma":
        return dolma.read(path, rejects)
    if source.kind == "instruct":
        return instruct.read(path, rejects)
    if source.kind == "self":
        return self_answers.read(path, source.cut_repeats, rejects)
    if source.kind == "text":
        return text.read(path, source.column, rejects)
    return tinystories.read(path, rejects)
