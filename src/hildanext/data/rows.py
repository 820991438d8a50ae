"""Packed rows in memory-mapped shards, and the pseudorandom order in which training reads them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hildanext.config import Config
from hildanext.data.packing import Row, position_ids
from hildanext.data.shards import Shard, StoredShard, check_sizes, compact, shard_path
from hildanext.data.tokenizer import fingerprint
from hildanext.errors import CheckpointError, DataError
from hildanext.files import fsync_folder, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Rows:
    """Packed rows of a `.rows` folder, or rows in memory.

    Opening a folder reads only `meta.json`. A shard is memory-mapped, and checked against its SHA-256 at its first row.
    """

    def __init__(self, meta: dict[str, Any], shards: Sequence[Shard | StoredShard]) -> None:
        self.meta, self.shards = meta, shards
        self.ends = list(accumulate(shard.n_rows for shard in shards))

    @classmethod
    def open(cls, folder: str | Path) -> Rows:
        """Open a `.rows` folder read-only. Raises DataError naming a file that is missing or has the wrong size."""
        folder = Path(folder)
        meta = read_meta(folder)
        shards = [(shard["rows"], shard["sha256"]) for shard in meta["shards"]]
        check_sizes(folder, meta["shards"])
        return cls(meta, [StoredShard(shard_path(folder, number), *shard) for number, shard in enumerate(shards)])

    @classmethod
    def of(cls, rows: Iterable[Row], seq_len: int) -> Rows:
        """Rows in memory."""
        shard = compact(rows, seq_len)
        return cls({"rows": shard.n_rows, "seq_len": seq_len}, [shard])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def seq_len(self) -> int:
        """Row length L in tokens."""
        return int(self.meta["seq_len"])

    def row(self, index: int) -> Row:
        """The row at `index`. Raises IndexError for an index outside the rows."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self.ends, index)
        return self.shards[number].row(index - self.ends[number] + self.shards[number].n_rows)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_ids`, `doc_ids`, `position_ids` [B, L] int64 and `loss_mask` [B, L] bool of the rows at `indices`.

        Raises IndexError for an index outside the rows.
        """
        return to_batch([self.row(int(index)) for index in indices])


def read_meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` of a `.rows` folder. Raises DataError when it is missing, damaged or contradicts itself."""
    path = folder / "meta.json"
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        n_rows = sum(int(shard["rows"]) for shard in meta["shards"])
        digest = sha256_of_shards(meta["shards"])
        whole = int(meta["seq_len"]) > 0 and (n_rows, digest) == (meta["rows"], meta["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{path}: missing or damaged; run 'hildanext tokenize' again")
    return meta


def sha256_of_shards(shards: Sequence[dict[str, Any]]) -> str:
    """SHA-256 over the SHA-256 of all shards."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()


def to_batch(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows as tensors: `input_ids`, `doc_ids`, `position_ids` [B, L] int64 and `loss_mask` [B, L] bool."""
    import torch

    doc_ids = np.stack([row.doc_ids for row in rows]).astype(np.int64)
    return {
        "input_ids": torch.from_numpy(np.stack([row.input_ids for row in rows]).astype(np.int64)),
        "doc_ids": torch.from_numpy(doc_ids),
        "position_ids": torch.from_numpy(position_ids(doc_ids)),
        "loss_mask": torch.from_numpy(np.stack([row.loss_mask for row in rows])),
    }


def write_meta(folder: Path, meta: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write `meta.json`: `meta` with the rows, bytes and SHA-256 of the shards from their `records`. Returns it."""
    shards = [{name: record[name] for name in ("rows", "bytes", "sha256")} for record in records]
    n_rows = sum(shard["rows"] for shard in shards)
    whole = meta | {"rows": n_rows, "sha256": sha256_of_shards(shards), "shards": shards}
    write_json(folder / "meta.json", whole)
    fsync_folder(folder)
    return whole


class RowSource(Protocol):
    """The rows of a training run. Global sample g is the same row for any number of processes or resumes."""

    def batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of global samples, see `to_batch`. Streams require increasing sample numbers."""
        ...

    def describe(self, samples: Sequence[int] | None = None) -> str:
        """The place of these samples, for error messages; a description of all rows without samples."""
        ...

    def state(self, next_sample: int) -> dict[str, Any]:
        """JSON values for a checkpoint, so that `restore` can continue with `next_sample`."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`. Raises CheckpointError when the data have changed."""
        ...

    def close(self) -> None:
        """Stop background work."""
        ...


class ShuffledRows:
    """Tokenized rows in the order of `RowOrder`: the `RowSource` for tokenized data."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.order = rows, RowOrder(len(rows), seed)

    def batch(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of global samples, see `to_batch`."""
        return self.rows.batch([self.order.row(sample) for sample in samples])

    def describe(self, samples: Sequence[int] | None = None) -> str:
        """The row numbers of the samples, or how many rows there are."""
        if samples is None:
            return f"{len(self.rows)} rows"
        return f"rows {sorted(self.order.row(sample) for sample in samples)}"

    def state(self, next_sample: int) -> dict[str, Any]:
        """SHA-256 of the rows. Their order depends only on the seed."""
        return {"rows_sha256": self.rows.meta["sha256"]}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the rows have changed since the run started."""
        if state != self.state(0):
            raise CheckpointError("the tokenized rows have changed since the run started; restore data/tokenized")

    def close(self) -> None:
        """Nothing to close."""


_ROUNDS = 6
_BITS64 = (1 << 64) - 1


class RowOrder:
    """The row of each global sample. Every epoch is a different pseudorandom permutation of all rows.

    The permutation is a Feistel network over the smallest even number of bits that can hold `n_rows`, keyed by
    (seed, epoch) and repeated until its output is a row number (cycle walking). It needs no memory, and the row of any
    sample is computed directly.
    """

    def __init__(self, n_rows: int, seed: int) -> None:
        if n_rows < 1:
            raise ValueError("an order needs at least one row")
        self.n_rows, self.seed = n_rows, seed
        self.half_bits = max(1, ((n_rows - 1).bit_length() + 1) // 2)

    def row(self, g: int) -> int:
        """Row number in [0, n_rows) of global sample `g` (>= 0)."""
        epoch, index = divmod(g, self.n_rows)
        digest = hashlib.blake2b(f"{self.seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]
        while True:
            index = self._permute(index, keys)
            if index < self.n_rows:
                return index

    def _permute(self, value: int, keys: list[int]) -> int:
        low = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & low
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & _BITS64
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _BITS64
            left, right = right, left ^ (mixed >> 32 & low)
        return left << self.half_bits | right


def open_rows(config: Config, split: str, tokenizer: PreTrainedTokenizerBase) -> Rows | None:
    """The tokenized rows of a split; None when the split has no rows.

    Raises DataError when the rows are missing, have another length than data.seq_len, or come from another tokenizer.
    """
    folder = Path(config.paths.data) / "tokenized" / f"{split}.rows"
    if not folder.is_dir():
        raise DataError(f"{folder}: no tokenized rows; run 'hildanext tokenize' first")
    rows = Rows.open(folder)
    if len(rows) == 0:
        return None
    if rows.seq_len != config.data.seq_len:
        raise DataError(
            f"{folder}: rows have {rows.seq_len} tokens, but data.seq_len is {config.data.seq_len}; tokenize again"
        )
    if rows.meta["tokenizer"] != fingerprint(tokenizer):
        raise DataError(f"{folder}: written with another tokenizer than that of '{config.model.base}'; tokenize again")
    return rows
