from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.data import shards
from hildanext.data.packing import Row, pack
from hildanext.data.rows import RowOrder, Rows, write_meta
from hildanext.data.shards import compact, write_shard
from hildanext.errors import DataError


def write(folder: Path, lengths: list[int], seq_len: int = 16) -> list[Row]:
    docs = [(np.arange(n, dtype=np.int32) + 10, np.arange(n) % 2 == 0) for n in lengths]
    rows = list(pack(docs, seq_len, 0))
    folder.mkdir()
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    records = [write_shard(folder, number, compact(half, seq_len), {}) for number, half in enumerate(halves)]
    write_meta(folder, {"seq_len": seq_len}, records)
    return rows


def test_batch_gives_back_what_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "x.rows", [5, 9, 30, 16, 3, 7])
    rows = Rows.open(tmp_path / "x.rows")
    assert len(rows) == len(written)
    assert rows.seq_len == 16
    batch = rows.batch([2, 0])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 16)),
        "doc_ids": (torch.int64, (2, 16)),
        "position_ids": (torch.int64, (2, 16)),
        "loss_mask": (torch.bool, (2, 16)),
    }
    for position, index in enumerate([2, 0]):
        for name in ("input_ids", "doc_ids", "loss_mask"):
            assert batch[name][position].tolist() == getattr(written[index], name).tolist()
        # a token is its position plus ten, except for the second piece of the document that was cut
        used = (batch["doc_ids"][position] >= 0) & (batch["input_ids"][position] < 10 + 16)
        assert (batch["position_ids"][position][used] == batch["input_ids"][position][used] - 10).all()


def test_empty_rows_open(tmp_path: Path) -> None:
    write(tmp_path / "x.rows", [])
    assert len(Rows.open(tmp_path / "x.rows")) == 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_shard_of_the_wrong_size_is_named(tmp_path: Path, number: int) -> None:
    write(tmp_path / "x.rows", [5, 9, 30])
    path = tmp_path / f"x.rows/shard-0000{number}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=rf"shard-0000{number}\.safetensors: \d+ bytes, expected \d+ bytes; run .*--verify"
    ):
        Rows.open(tmp_path / "x.rows")
    path.unlink()
    with pytest.raises(DataError, match=rf"shard-0000{number}\.safetensors: missing"):
        Rows.open(tmp_path / "x.rows")


def test_a_broken_header_is_named_when_the_shard_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x.rows", [5, 9, 30])
    path = tmp_path / "x.rows/shard-00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    rows = Rows.open(tmp_path / "x.rows")
    rows.batch([0])
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: damaged"):
        rows.batch([len(rows) - 1])


def test_a_flipped_bit_is_named_before_a_row_of_its_shard_is_given(tmp_path: Path) -> None:
    """The size is the same, and so is the header: only the checksum can tell."""
    write(tmp_path / "x.rows", [5, 9, 30])
    path = tmp_path / "x.rows/shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    rows = Rows.open(tmp_path / "x.rows")
    rows.batch([0])
    line = r"shard-00001\.safetensors: damaged \(the SHA-256 differs from the recorded one\); run 'hildanext tokenize --verify'"
    with pytest.raises(DataError, match=line):
        rows.batch([len(rows) - 1])


def test_a_shard_is_read_once_for_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is opened, until it changes."""
    write(tmp_path / "x.rows", [5, 9, 30])
    read: list[Path] = []
    sha256_of = shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of", lambda path: read.append(path) or sha256_of(path))
    for _ in range(2):
        rows = Rows.open(tmp_path / "x.rows")
        for _ in range(2):
            rows.batch(range(len(rows)))
    assert len(read) == 2
    path = tmp_path / "x.rows/shard-00000.safetensors"
    os.utime(path, ns=(1, 1))
    Rows.open(tmp_path / "x.rows").batch([0])
    assert read[2:] == [path]


@settings(deadline=None)  # of a busy machine
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 70_000)), max_size=30),
    st.integers(8, 17),
    st.integers(1, 4),
)
def test_rows_survive_the_compact_form(docs: list[tuple[int, int]], seq_len: int, n_shards: int) -> None:
    arrays = [(np.arange(n, dtype=np.int32) + first, np.arange(n) % 3 == 0) for n, first in docs]
    packed = list(pack(arrays, seq_len, 0))
    shards = [compact(packed[i::n_shards], seq_len) for i in range(n_shards)]
    rows = Rows({"seq_len": seq_len}, shards)
    expected = [row for i in range(n_shards) for row in packed[i::n_shards]]
    assert len(rows) == len(expected)
    for index, row in enumerate(expected):
        for found, wanted in zip(rows.row(index), row, strict=True):
            assert found.dtype == wanted.dtype
            assert found.tolist() == wanted.tolist()
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.row(outside)


@pytest.mark.parametrize("text", [None, "{", "[]", json.dumps({"rows": 1})])
def test_a_broken_meta_is_named(tmp_path: Path, text: str | None) -> None:
    write(tmp_path / "x.rows", [5])
    if text is None:
        (tmp_path / "x.rows/meta.json").unlink()
    else:
        (tmp_path / "x.rows/meta.json").write_text(text)
    with pytest.raises(DataError, match=r"meta\.json: missing or damaged"):
        Rows.open(tmp_path / "x.rows")


@settings(deadline=None)  # of a busy machine
@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_each_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = RowOrder(n, seed)
    assert sorted(order.row(epoch * n + i) for i in range(n)) == list(range(n))


@settings(deadline=None)  # of a busy machine
@given(st.integers(20, 300), st.integers(0, 1000))
def test_epochs_and_seeds_differ_and_runs_agree(n: int, seed: int) -> None:
    first, again, other = RowOrder(n, seed), RowOrder(n, seed), RowOrder(n, seed + 1)
    epochs = [[first.row(epoch * n + i) for i in range(n)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(n))
    assert epochs[1] == [again.row(n + i) for i in range(n)]
    assert epochs[0] != [other.row(i) for i in range(n)]


def test_order_is_spread_evenly_and_needs_no_memory() -> None:
    # Where the first of 16 rows goes over many epochs: a biased network would prefer some places.
    counts = np.bincount([RowOrder(16, 0).row(epoch * 16) for epoch in range(3200)], minlength=16)
    assert counts.min() > 120
    assert counts.max() < 290
    assert 0 <= RowOrder(10**12, 3).row(10**15 + 7) < 10**12


def test_order_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        RowOrder(0, 0)
