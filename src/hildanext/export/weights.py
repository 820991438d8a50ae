"""Copy tensors between safetensors files without holding them in memory.

A file is 8 bytes (the header's length, little-endian), the header (JSON: dtype, shape and byte range of each tensor) and
the tensors' bytes (https://github.com/huggingface/safetensors, "Format"). A copy is a new header and the same bytes, so
its size in memory does not depend on the model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from hildanext.errors import CheckpointError
from hildanext.files import write_json

CHUNK = 1 << 24  # bytes that are copied at once
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    dtype: str  # as in the header: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.n_bytes // self.shape[0]


class Rows(NamedTuple):
    """Rows that replace those of a copied matrix from `first` on."""

    name: str
    first: int
    values: Tensor  # [n, H]


def stored_tensors(paths: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of safetensors files by name. Raises CheckpointError for a damaged file."""
    found: dict[str, Stored] = {}
    for path in paths:
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length) if length < size else b"")
            for name, entry in header.items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
                    if 8 + length + last > size:
                        raise ValueError("it ends early")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged safetensors file ({error}); restore it") from None
    return found


def by_file(tensors: dict[str, Stored]) -> dict[Path, dict[str, Stored]]:
    """The tensors of each file, in the order of the files."""
    found: dict[Path, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        found.setdefault(stored.file, {})[name] = stored
    return found


def read_rows(stored: Stored, first: int, n: int) -> Tensor:
    """Rows [n, ...] of a stored tensor, in its dtype."""
    with open(stored.file, "rb") as file:
        file.seek(stored.start + first * stored.row_bytes)
        raw = bytearray(file.read(n * stored.row_bytes))
    return torch.frombuffer(raw, dtype=DTYPES[stored.dtype]).view(n, *stored.shape[1:])


def mean_row(stored: Stored, ids: Iterable[int]) -> Tensor:
    """The mean [H] of rows of a stored matrix [V, H], float64. `ids` in rising order."""
    total, count = torch.zeros(stored.shape[1], dtype=torch.float64), 0
    for start, stop in ranges(ids):
        for first in range(start, stop, step := max(1, CHUNK // stored.row_bytes)):
            rows = read_rows(stored, first, min(step, stop - first))
            total, count = total + rows.double().sum(0), count + len(rows)
    return total / count


def ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Rising ids as half-open ranges."""
    found: list[tuple[int, int]] = []
    for i in ids:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def write_shards(folder: Path, shards: list[dict[str, Stored]], changed: list[Rows]) -> None:
    """Write tensors as the shards of a Hugging Face folder, with an index if there are several.

    changed: rows that differ from the stored ones.
    """
    n, of = len(shards), dict[str, str]()
    for number, tensors in enumerate(shards, start=1):
        name = "model.safetensors" if n == 1 else f"model-{number:05}-of-{n:05}.safetensors"
        _write(folder / name, tensors, [rows for rows in changed if rows.name in tensors])
        of |= dict.fromkeys(tensors, name)
    if n > 1:
        total = sum(stored.n_bytes for tensors in shards for stored in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(of.items()))})


def _write(path: Path, tensors: dict[str, Stored], changed: list[Rows]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    # Wider elements first, as safetensors itself does: each tensor then begins at a multiple of its element's size.
    for name in sorted(
        tensors, key=lambda name: (-tensors[name].n_bytes // max(math.prod(tensors[name].shape), 1), name)
    ):
        stored = tensors[name]
        starts[name] = end
        end += stored.n_bytes
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [starts[name], end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in starts:
            _copy(tensors[name], file)
        for rows in changed:
            stored = tensors[rows.name]
            file.seek(8 + len(encoded) + starts[rows.name] + rows.first * stored.row_bytes)
            values = rows.values.to(DTYPES[stored.dtype]).contiguous()
            file.write(values.view(torch.uint8).numpy().tobytes())


def _copy(stored: Stored, target: IO[bytes]) -> None:
    """Append a stored tensor's bytes."""
    left = stored.n_bytes
    with open(stored.file, "rb") as file:
        file.seek(stored.start)
        while left:
            piece = file.read(min(CHUNK, left))
            if not piece:
                raise CheckpointError(f"{stored.file}: ends early; restore it")
            target.write(piece)
            left -= len(piece)
