from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hildanext.data.packing import OPEN_ROWS, pack, position_ids

PAD = 999


def make_docs(lengths: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Documents whose tokens are all different, so that a lost or doubled one shows."""
    ends = np.cumsum(lengths)
    ids = [np.arange(end - n, end, dtype=np.int32) + 1000 for n, end in zip(lengths, ends, strict=True)]
    return [(array, array % 3 == 0) for array in ids]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(8, 17))
def test_rows_hold_every_document_once(lengths: list[int], seq_len: int) -> None:
    docs = make_docs(lengths)
    supervised = {int(i): bool(m) for ids, mask in docs for i, m in zip(ids, mask, strict=True)}
    rows = list(pack(docs, seq_len, PAD))
    pieces = []
    for row in rows:
        assert row.input_ids.shape == row.doc_ids.shape == row.loss_mask.shape == (seq_len,)
        assert (row.input_ids.dtype, row.doc_ids.dtype, row.loss_mask.dtype) == (np.int32, np.int32, bool)
        used = row.doc_ids >= 0
        assert (row.input_ids[~used] == PAD).all()
        assert not row.loss_mask[~used].any()
        # documents are numbered from 0 in their order, padding only at the end
        assert (np.diff(row.doc_ids[used]) >= 0).all()
        assert not used[int(used.sum()) :].any()
        assert set(row.doc_ids[used].tolist()) == set(range(int(row.doc_ids.max()) + 1))
        pieces += [row.input_ids[row.doc_ids == d].tolist() for d in range(int(row.doc_ids.max()) + 1)]
        assert [supervised[i] for i in row.input_ids[used].tolist()] == row.loss_mask[used].tolist()
    expected = [ids[i : i + seq_len].tolist() for ids, _ in docs for i in range(0, len(ids), seq_len)]
    assert sorted(pieces) == sorted(expected)


@given(st.lists(st.integers(1, 30), max_size=40))
def test_packing_is_deterministic(lengths: list[int]) -> None:
    first, second = (list(pack(make_docs(lengths), 16, PAD)) for _ in range(2))
    assert all((a == b).all() for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_little_padding_and_bounded_memory() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, size=3000).tolist()
    taken = 0

    def docs():
        nonlocal taken
        for doc in make_docs(lengths):
            taken += len(doc[0])
            yield doc

    given_out = padding = 0
    for row in pack(docs(), 256, PAD):
        given_out += int((row.doc_ids >= 0).sum())
        padding += int((row.doc_ids < 0).sum())
        assert taken - given_out <= (OPEN_ROWS + 1) * 256
    assert given_out == sum(lengths)
    assert padding / (padding + given_out) < 0.05


def test_source_arrays_are_not_kept_alive() -> None:
    whole = np.arange(1000, dtype=np.int32)
    row = next(pack([(whole[:5], np.ones(5, dtype=bool))], 8, PAD))
    assert not np.shares_memory(row.input_ids, whole)


@given(st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_position_ids_match_a_loop(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        positions = [0]
        for i in range(1, len(row)):
            positions.append(positions[-1] + 1 if row[i] == row[i - 1] else 0)
        expected.append(positions)
    result = position_ids(np.array(rows, dtype=np.int32))
    assert result.dtype == np.int64
    assert result.tolist() == expected
    assert position_ids(np.array(rows[0])).tolist() == expected[0]


@pytest.mark.parametrize("docs", [[], [(np.empty(0, np.int32), np.empty(0, bool))]])
def test_nothing_to_pack_gives_no_row(docs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert list(pack(docs, 8, PAD)) == []
