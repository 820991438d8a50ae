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
from hildanext.data.sources.lines import lost_records, read_json_lines, read_records
from hildanext.data.sources.opening import File, file_exists, file_name, is_url, list_files, open_file
from hildanext.errors import DataError

SUFFIXES = (".npy", ".jsonl", ".jsonl.gz", ".jsonl.zst")
NUMPY_MAGIC = b"\x93NUMPY"
# A shard without boundaries is read as one document up to this many tokens. A larger one is an error.
MAX_UNBOUNDED = 1 << 22
KEYS = {"input_ids", "attention_mask", "length", "id", "source"}


def find(path: str) -> list[File]:
    """The shards and JSONL files at `path`."""
    return list_files(path, SUFFIXES)


def read(path: str, dtype: Literal["uint16", "uint32"], rejects: Rejects) -> Iterator[tuple[int, Document]]:
    """Yield (row, document) from one file. `dtype` is the integer type of a shard without a numpy header.

    Raises DataError for a large shard without its .csv.gz.
    """
    if file_name(path).endswith(".npy"):
        yield from _from_shard(path, dtype, rejects)
        return
    for number, record in read_json_lines(path, rejects):
        try:
            ids = _ids_of(record)
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        rejects.ignore(sorted(record.keys() - KEYS), number)
        name = str(record.get("id") or f"{file_name(path)}:{number}")
        yield number, Document(id=name, source=str(record.get("source") or "pretokenized"), input_ids=ids)


def _ids_of(record: dict[str, Any]) -> list[int]:
    """The ids of a record without its padding. Raises DataError where they differ from what the record says of them."""
    ids = check_ids(record.get("input_ids"))
    if record.get("length") not in (None, len(ids)):
        raise DataError("'length' is not the number of 'input_ids'")
    mask = record.get("attention_mask")
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise DataError("'attention_mask' has another length than 'input_ids'")
    return check_ids([token for token, real in zip(ids, mask, strict=True) if real])


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
    shard_path, mark, query = path.partition("?") if is_url(path) else (path, "", "")
    boundaries = f"{shard_path.removesuffix('.npy')}.csv.gz{mark}{query}"
    with open_file(path) as file:
        try:
            shard = TokenFile(file, dtype)
        except DataError as error:
            rejects.add(str(error), path, 1, _count_documents(boundaries, file.seek(0, 2)))
            return
        for number, name, start, end in _spans(path, boundaries, shard, rejects):
            try:
                yield number, Document(id=name, source="pretokenized", input_ids=check_ids(shard.ids(start, end)))
            except DataError as error:
                rejects.add(str(error), path, number)


def _count_documents(boundaries: str, size: int) -> int:
    """The documents of a shard that cannot be read: the rows of its boundary file, else an estimate; at least 1."""
    n_rows = 0
    if file_exists(boundaries):
        n_rows = sum(1 for _, line in read_records(boundaries, b"\n", Rejects()) if line.strip())
    return n_rows or lost_records(0, 0, size)


def _spans(path: str, boundaries: str, shard: TokenFile, rejects: Rejects) -> Iterable[tuple[int, str, int, int]]:
    """Yield (row, document id, start, end) for each document of a shard, in tokens, end exclusive."""
    if len(shard.shape) == 2:
        count, length = shard.shape
        return ((i + 1, f"{file_name(path)}:{i + 1}", i * length, (i + 1) * length) for i in range(count))
    (tokens,) = shard.shape
    if file_exists(boundaries):
        _check_dtype(path, shard, boundaries)
        return _read_boundaries(tokens, boundaries, rejects)
    if tokens > MAX_UNBOUNDED:
        raise DataError(f"{path}: {tokens} tokens without {file_name(boundaries)}, which holds the document boundaries")
    if shard.begin == 0 and shard.dtype == np.uint16 and _is_uint32(shard.ids(0, tokens)):
        raise DataError(f"{path}: every second id is 0; set 'dtype' of the source to 'uint32'")
    return [(1, file_name(path), 0, tokens)]


def _is_uint32(ids: list[int]) -> bool:
    """Whether uint16 ids look like uint32 ids read in halves. The upper half of an id below 262,144 is at most 3."""
    return len(ids) >= 16 and max(ids[1::2]) <= 3 < max(ids[::2])


def _check_dtype(path: str, shard: TokenFile, boundaries: str) -> None:
    """Raises DataError for a raw shard whose size fits its boundaries only with the other integer type."""
    if shard.begin > 0:  # a numpy header says the type
        return
    (tokens,) = shard.shape
    last = max((end for _, _, _, end in _boundary_rows(boundaries, Rejects())), default=0)
    other = np.dtype(np.uint32 if shard.dtype == np.uint16 else np.uint16)
    if last != tokens and last * other.itemsize == tokens * shard.dtype.itemsize:
        raise DataError(
            f"{path}: holds {tokens} ids of {shard.dtype}, but {file_name(boundaries)} ends at {last}; set 'dtype' of the "
            f"source to '{other}'"
        )


def _read_boundaries(tokens: int, boundaries: str, rejects: Rejects) -> Iterator[tuple[int, str, int, int]]:
    """Yield (row, document id, start, end) for each row of a boundary file that lies within the shard's tokens."""
    number = last = 0
    for number, name, start, end in _boundary_rows(boundaries, rejects):
        if not 0 <= start < end <= tokens:
            rejects.add("boundaries outside the shard", boundaries, number)
            continue
        last = max(last, end)
        yield number, name, start, end
    if last < tokens:
        rejects.add("tokens after the last boundary", boundaries, number + 1)


def _boundary_rows(boundaries: str, rejects: Rejects) -> Iterator[tuple[int, str, int, int]]:
    """Yield (row, document id, start, end) for each row of a boundary file."""
    rows = csv.reader(line.decode("utf-8", "replace") + "\n" for _, line in read_records(boundaries, b"\n", rejects))
    number = 0
    while True:
        number += 1
        try:
            row = next(rows)
            yield number, row[2], int(row[0]), int(row[1])
        except StopIteration:
            return
        except (ValueError, IndexError, csv.Error):
            rejects.add("broken boundaries", boundaries, number)
