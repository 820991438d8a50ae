"""Packed rows on disk: written once, memory-mapped by training, read in a pseudorandom order that needs no memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from hildanext.errors import DataError
from hildanext.files import fsync_folder, write_json
from hildanext.packing import Row, position_ids

if TYPE_CHECKING:
    import torch

# File name and type of each array, [rows, seq_len] each.
ARRAYS: dict[str, type] = {"input_ids": np.int32, "doc_ids": np.int32, "loss_mask": np.uint8}


class RowWriter:
    """Writes rows to a new folder: `input_ids.bin`, `doc_ids.bin` (int32), `loss_mask.bin` (uint8), then `meta.json`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.count = 0
        self.padding = 0
        self.files = {name: open(self.folder / f"{name}.bin", "wb") for name in ARRAYS}  # noqa: SIM115

    def write(self, row: Row) -> None:
        """Append one row."""
        for name, dtype in ARRAYS.items():
            self.files[name].write(row._asdict()[name].astype(dtype, copy=False).tobytes())
        self.count += 1
        self.padding += int((row.doc_ids < 0).sum())

    def finish(self, meta: dict[str, Any]) -> None:
        """Make the arrays durable and write `meta`, which must hold 'rows' and 'seq_len'."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.folder / "meta.json", meta)
        fsync_folder(self.folder)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            file.close()


class Rows:
    """Packed rows of a folder, memory-mapped: opening reads nothing but `meta.json`."""

    def __init__(self, folder: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.folder, self.meta, self.arrays = folder, meta, arrays

    @classmethod
    def open(cls, folder: str | Path) -> Rows:
        """Open a `.rows` folder read-only. Raises DataError naming the file that is missing or has the wrong size."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            shape = (int(meta["rows"]), int(meta["seq_len"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{folder / 'meta.json'}: missing or broken; run 'hildanext tokenize' again") from None
        arrays: dict[str, np.ndarray] = {}
        for name, dtype in ARRAYS.items():
            path = folder / f"{name}.bin"
            size = path.stat().st_size if path.is_file() else -1
            expected = shape[0] * shape[1] * np.dtype(dtype).itemsize
            if size != expected:
                found = "missing" if size < 0 else f"{size} bytes"
                raise DataError(f"{path}: {found}, expected {expected} bytes; run 'hildanext tokenize' again")
            # An empty file cannot be mapped.
            arrays[name] = np.memmap(path, dtype=dtype, mode="r", shape=shape) if expected else np.empty(shape, dtype)
        return cls(folder, meta, arrays)

    def __len__(self) -> int:
        return len(self.arrays["input_ids"])

    @property
    def seq_len(self) -> int:
        """Row length L in tokens."""
        return int(self.meta["seq_len"])

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`input_ids`, `doc_ids`, `position_ids` [B, L] int64 and `loss_mask` [B, L] bool of the rows at `indices`.

        Raises IndexError for an index outside the rows.
        """
        import torch

        index = np.asarray(indices, dtype=np.int64)
        doc_ids = self.arrays["doc_ids"][index].astype(np.int64)
        return {
            "input_ids": torch.from_numpy(self.arrays["input_ids"][index].astype(np.int64)),
            "doc_ids": torch.from_numpy(doc_ids),
            "position_ids": torch.from_numpy(position_ids(doc_ids)),
            "loss_mask": torch.from_numpy(self.arrays["loss_mask"][index].astype(bool)),
        }


_ROUNDS = 6
_BITS64 = (1 << 64) - 1


class RowOrder:
    """The row that global sample g trains on: every epoch is another pseudorandom permutation of all rows.

    A Feistel network over the smallest even number of bits that holds `n_rows`, walked until it lands on a row; keyed
    by (seed, epoch), so the order needs no memory and any sample can be asked for first.
    """

    def __init__(self, n_rows: int, seed: int) -> None:
        if n_rows < 1:
            raise ValueError("an order needs at least one row")
        self.n_rows, self.seed = n_rows, seed
        self.half_bits = max(1, ((n_rows - 1).bit_length() + 1) // 2)

    def row(self, g: int) -> int:
        """Row of global sample `g` (>= 0): a number in [0, n_rows)."""
        epoch, index = divmod(g, self.n_rows)
        keys = self._keys(epoch)
        while True:
            index = self._permute(index, keys)
            if index < self.n_rows:
                return index

    def _keys(self, epoch: int) -> list[int]:
        digest = hashlib.blake2b(f"{self.seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def _permute(self, value: int, keys: list[int]) -> int:
        low = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & low
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & _BITS64
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _BITS64
            left, right = right, left ^ (mixed >> 32 & low)
        return left << self.half_bits | right
