"""Token ids that another tool wrote: `dolma tokens` shards, numpy arrays, or JSON lines with 'input_ids'.

`dolma tokens` writes a shard's ids as one raw array (named .npy, but without numpy's header) and beside it a .csv.gz
with a row per document: start, end (token offsets, end exclusive), id, src (the text file), loc (its line).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from hildanext.documents import Document, Rejects, check_ids
from hildanext.errors import DataError
from hildanext.sources.lines import list_files, read_json_lines, read_records

SUFFIXES = (".npy", ".jsonl", ".jsonl.gz", ".jsonl.zst")
NUMPY_MAGIC = b"\x93NUMPY"
# A shard whose boundaries are lost is one document up to here (tokens); beyond, that is surely not meant.
MAX_UNBOUNDED = 1 << 22


def find(path: str) -> list[Path]:
    """The shards and JSONL files below `path`."""
    return list_files(path, SUFFIXES)


def read(path: Path, dtype: Literal["uint16", "uint32"], rejects: Rejects) -> Iterator[Document]:
    """Documents of one file; `dtype` is the integer type of a shard without a numpy header.

    Raises DataError for a large shard without its .csv.gz.
    """
    if path.suffix == ".npy":
        yield from _from_shard(path, dtype, rejects)
        return
    for number, record in read_json_lines(path, rejects):
        try:
            ids = check_ids(record.get("input_ids"))
        except DataError as error:
            rejects.add(str(error), path, number)
            continue
        name = str(record.get("id") or f"{path.name}:{number}")
        yield Document(id=name, source=str(record.get("source") or "pretokenized"), input_ids=ids)


def _map(path: Path, dtype: str) -> np.ndarray:
    """The shard's ids, memory-mapped: [tokens], or [documents, tokens]. Raises DataError for what is no array of ids."""
    with open(path, "rb") as file:
        header = file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC
    size = path.stat().st_size
    if not header:
        if size == 0 or size % np.dtype(dtype).itemsize:
            raise DataError(f"not a raw array of {dtype}")
        return np.memmap(path, dtype=dtype, mode="r")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise DataError("damaged numpy file") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        raise DataError("not an array of token ids")
    return ids


def _from_shard(path: Path, dtype: str, rejects: Rejects) -> Iterator[Document]:
    try:
        ids = _map(path, dtype)
    except DataError as error:
        rejects.add(str(error), path, 1)
        return
    boundaries = path.with_suffix(".csv.gz")
    spans: Iterable[tuple[int, str, np.ndarray]]
    if ids.ndim == 2:
        spans = ((i + 1, f"{path.name}:{i + 1}", ids[i]) for i in range(len(ids)))
    elif boundaries.is_file():
        spans = _cut(ids, boundaries, rejects)
    elif len(ids) <= MAX_UNBOUNDED:
        spans = [(1, path.name, ids)]
    else:
        raise DataError(f"{path}: {len(ids)} tokens without {boundaries.name} beside it, so its documents are unknown")
    for number, name, span in spans:
        try:
            yield Document(id=name, source="pretokenized", input_ids=check_ids(span.tolist()))
        except DataError as error:
            rejects.add(str(error), path, number)


def _cut(ids: np.ndarray, boundaries: Path, rejects: Rejects) -> Iterator[tuple[int, str, np.ndarray]]:
    """(row, document id, ids) for each row of a boundary file."""
    lines = (line.decode("utf-8", "replace") + "\n" for _, line in read_records(boundaries, b"\n", rejects))
    number = 0
    try:
        for number, row in enumerate(csv.reader(lines), start=1):
            try:
                start, end, name = int(row[0]), int(row[1]), row[2]
            except (ValueError, IndexError):
                rejects.add("broken boundaries", boundaries, number)
                continue
            if not 0 <= start < end <= len(ids):
                rejects.add("boundaries outside the shard", boundaries, number)
                continue
            yield number, name, ids[start:end]
    except csv.Error:
        rejects.add("broken boundaries", boundaries, number + 1)
