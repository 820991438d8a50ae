"""Shards of packed rows: compact arrays in a safetensors file. A JSON record beside the file is written after it.

A token takes 2 or 4 bytes for its id, one bit for document starts and one bit for the loss mask.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hildanext.data.packing import Row
from hildanext.errors import DataError
from hildanext.files import atomic_open, sha256_of, write_json
from hildanext.progress import Advance

REBUILD_HINT = "run 'hildanext tokenize --verify' to rebuild it"


class Shard(NamedTuple):
    """The rows of a shard in compact form."""

    input_ids: np.ndarray  # [rows, L] uint16 or uint32
    starts: np.ndarray  # [rows, ceil(L/8)] uint8, one bit per token: the first token of a document
    loss_mask: np.ndarray  # [rows, ceil(L/8)] uint8, one bit per token
    used: np.ndarray  # [rows] int32, tokens before the padding

    @property
    def n_rows(self) -> int:
        return len(self.used)

    def row(self, index: int) -> Row:
        """The row at `index`, expanded."""
        ids = self.input_ids[index].astype(np.int32)
        starts = np.unpackbits(self.starts[index], count=len(ids))
        doc_ids = np.cumsum(starts, dtype=np.int32) - 1
        doc_ids[self.used[index] :] = -1
        return Row(ids, doc_ids, np.unpackbits(self.loss_mask[index], count=len(ids)).astype(bool))


def compact(rows: Iterable[Row], seq_len: int) -> Shard:
    """Convert rows to a shard."""
    ids, starts, masks, used = [], [], [], []
    for row in rows:
        # All rows of the shard are collected in memory, so ids use the narrowest type.
        ids.append(row.input_ids.astype(np.uint16 if row.input_ids.max() < 1 << 16 else np.uint32))
        starts.append(np.packbits(np.diff(row.doc_ids, prepend=-1) > 0))
        masks.append(np.packbits(row.loss_mask))
        used.append(int((row.doc_ids >= 0).sum()))
    bits = (seq_len + 7) // 8
    return Shard(
        np.stack(ids) if ids else np.empty((0, seq_len), np.uint16),
        np.stack(starts) if starts else np.empty((0, bits), np.uint8),
        np.stack(masks) if masks else np.empty((0, bits), np.uint8),
        np.array(used, dtype=np.int32),
    )


class StoredShard:
    """A shard on disk, checked and memory-mapped at the first access to a row."""

    def __init__(self, path: Path, n_rows: int, sha256: str) -> None:
        self.path, self.n_rows, self.sha256 = path, n_rows, sha256

    @cached_property
    def slices(self) -> dict[str, Any]:
        """The arrays of the file, not yet read. Raises DataError for a damaged or unreadable file."""
        try:
            status = self.path.stat()
            if digest(self.path, status.st_size, status.st_mtime_ns) != self.sha256:
                raise DataError(f"{self.path}: damaged (the SHA-256 differs from the recorded one); {REBUILD_HINT}")
            file = safe_open(self.path, framework="numpy")
            return {name: file.get_slice(name) for name in Shard._fields}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); {REBUILD_HINT}") from None

    def row(self, index: int) -> Row:
        """The row at `index`, read from the file."""
        return Shard(**{name: array[index : index + 1] for name, array in self.slices.items()}).row(0)


@cache
def digest(path: Path, size: int, modified_ns: int) -> str:
    """SHA-256 of a file, computed once per process while its size and modification time are the same."""
    return sha256_of(path)


def shard_path(folder: Path, number: int) -> Path:
    """The file of shard `number`. Its record has the same name with the suffix .json."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, shard: Shard, record: dict[str, Any]) -> dict[str, Any]:
    """Write a shard, then its record (`record` with rows, bytes and SHA-256), each atomically. Returns the record."""
    data = save(shard._asdict())
    path = shard_path(folder, number)
    with atomic_open(path, "wb") as file:
        file.write(data)
    whole = {"rows": shard.n_rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | record
    write_json(path.with_suffix(".json"), whole)
    return whole


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Records of the complete shards of a folder, up to the first shard that is missing or has the wrong size."""
    records: list[dict[str, Any]] = []
    while True:
        path = shard_path(folder, len(records))
        try:
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if os.path.getsize(path) != record["bytes"]:
                return records
        except (OSError, ValueError):
            return records
        records.append(record)


def check_sizes(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Raises DataError naming the first shard that is missing or has the wrong size."""
    for number, shard in enumerate(shards):
        path = shard_path(folder, number)
        size = path.stat().st_size if path.is_file() else -1
        if size != shard["bytes"]:
            actual = "missing" if size < 0 else f"{size} bytes"
            raise DataError(f"{path}: {actual}, expected {shard['bytes']} bytes; {REBUILD_HINT}")


def damaged(folder: Path, shards: Sequence[dict[str, Any]], advance: Advance) -> list[int]:
    """Numbers of the shards whose file is missing or has the wrong SHA-256."""
    numbers = []
    for number, shard in enumerate(shards):
        path = shard_path(folder, number)
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            numbers.append(number)
        advance(number + 1)
    return numbers
