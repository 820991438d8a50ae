"""Pretokenized data: shards of `dolma tokens`, numpy arrays, or JSON lines with 'input_ids'.

`dolma tokens` writes the ids of a shard as a raw array (with the suffix .npy but without a numpy header) and a .csv.gz
with a row per document: start, end (token offsets, end exclusive), id, src (the text file), loc (its line).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import IO, Any, Literal

import numpy as np

from hildanext.data.documents import Document, Rejects, check_ids
from hildanext.data.sources.lines import read_json_lines, read_records
from hildanext.data.sources.opening import File, file_exists, file_name, list_files, open_file
from hildanext.errors import DataError

SUFFIXES = (".npy", ".jsonl", ".jsonl.gz", ".jsonl.zst")
NUMPY_MAGIC = b"\x93NUMPY"
# A shard without boundaries is read as one document up to this many tokens. A larger one is an error.
MAX_UNBOUNDED = 1 << 22


def find(path: str) -> list[File]:
    """The shards and JSONL files at `path`."""
    return list_files(path, SUFFIXES)


def read(path: str, dtype: Literal["uint16", "uint32"], rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (row, document) from one file. `dtype` is the integer type of a shard without a numpy header.

    Raises DataError for a large shard without its .csv.gz.
    """
    if path.endswith(".npy"):
        yield from _from_shard(path, dtype, rejects)
        return
    for number, record in read_json_lines(path, rejects):
        try:
            ids = check_ids(record.get("input_ids"))
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        name = str(record.get("id") or f"{file_name(path)}:{number}")
        yield number, Document(id=name, source=str(record.get("source") or "pretokenized"), input_ids=ids)


class TokenFile:
    """Random access to the ids of a shard. `shape` is (tokens,) or (documents, tokens)."""

    def __init__(self, file: IO[bytes], dtype: str) -> None:
        self.file, self.dtype = file, np.dtype(dtype)
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            self._read_header(size)
        else:
            self.begin = 0
            if size == 0 or size % self.dtype.itemsize:
                raise DataError(f"not a raw array of {dtype}")
            self.shape: tuple[int, ...] = (size // self.dtype.itemsize,)

    def _read_header(self, size: int) -> None:
        self.file.seek(0)
        try:
            version = np.lib.format.read_magic(self.file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, by_column, self.dtype = read(self.file)
        except (ValueError, EOFError):
            raise DataError("damaged numpy file") from None
        self.begin = self.file.tell()
        count = int(np.prod(self.shape))
        if self.dtype.kind not in "iu" or len(self.shape) not in (1, 2) or count == 0 or by_column:
            raise DataError("not an array of token ids")
        if size != self.begin + count * self.dtype.itemsize:
            raise DataError("damaged numpy file")

    def ids(self, start: int, end: int) -> list[Any]:
        """The ids from `start` to `end` (exclusive) of the flattened array."""
        self.file.seek(self.begin + start * self.dtype.itemsize)
        return np.frombuffer(self.file.read((end - start) * self.dtype.itemsize), dtype=self.dtype).tolist()


def _from_shard(path: str, dtype: str, rejects: Rejects) -> Iterator[tuple[int, Document]]:
    with open_file(path) as file:
        try:
            shard = TokenFile(file, dtype)
        except DataError as error:
            rejects.add(str(error), path, 1)
            return
        for number, name, start, end in _spans(path, shard, rejects):
            try:
                yield number, Document(id=name, source="pretokenized", input_ids=check_ids(shard.ids(start, end)))
            except DataError as error:
                rejects.add(str(error), path, number)


def _spans(path: str, shard: TokenFile, rejects: Rejects) -> Iterable[tuple[int, str, int, int]]:
    """Yield (row, document id, start, end) for each document of a shard, in tokens, end exclusive."""
    boundaries = path.removesuffix(".npy") + ".csv.gz"
    if len(shard.shape) == 2:
        count, length = shard.shape
        return ((i + 1, f"{file_name(path)}:{i + 1}", i * length, (i + 1) * length) for i in range(count))
    (tokens,) = shard.shape
    if file_exists(boundaries):
        return _read_boundaries(tokens, boundaries, rejects)
    if tokens <= MAX_UNBOUNDED:
        return [(1, file_name(path), 0, tokens)]
    raise DataError(f"{path}: {tokens} tokens without {file_name(boundaries)}, which holds the document boundaries")


def _read_boundaries(tokens: int, boundaries: str, rejects: Rejects) -> Iterator[tuple[int, str, int, int]]:
    """Yield (row, document id, start, end) for each row of a boundary file."""
    lines = (line.decode("utf-8", "replace") + "\n" for _, line in read_records(boundaries, b"\n", rejects))
    number = 0
    try:
        for number, row in enumerate(csv.reader(lines), start=1):
            try:
                start, end, name = int(row[0]), int(row[1]), row[2]
            except (ValueError, IndexError):
                rejects.add("broken boundaries", boundaries, number)
                continue
            if not 0 <= start < end <= tokens:
                rejects.add("boundaries outside the shard", boundaries, number)
                continue
            yield number, name, start, end
    except csv.Error:
        rejects.add("broken boundaries", boundaries, number + 1)
