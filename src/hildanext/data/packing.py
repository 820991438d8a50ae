"""Packs whole documents into rows of a fixed length, and defines `doc_ids` and `position_ids`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

# At most this many rows are open for more documents, with at most this many tokens together (16 MB).
OPEN_ROWS = 64
OPEN_TOKENS = 1 << 21


class Row(NamedTuple):
    """A packed row. `input_ids` [L] int32, `doc_ids` [L] int32 (from 0; padding -1), `loss_mask` [L] bool."""

    input_ids: np.ndarray
    doc_ids: np.ndarray
    loss_mask: np.ndarray


def pack(docs: Iterable[tuple[np.ndarray, np.ndarray]], seq_len: int, pad_id: int) -> Iterator[Row]:
    """Pack documents (`input_ids` [n] int, `loss_mask` [n] bool) into rows of `seq_len` tokens, every token once.

    A document is never split over rows; a document longer than a row is cut into pieces of `seq_len` tokens, each a
    document of its own. Best fit: each goes into the open row with the least sufficient space. Rows therefore follow
    the order of the documents only roughly, but the same documents always give the same rows. Free space is filled with
    `pad_id` and not supervised.
    """
    limit = max(1, min(OPEN_ROWS, OPEN_TOKENS // seq_len))
    spaces: list[tuple[int, int]] = []  # (free tokens, row number), sorted: the fullest row first
    pieces: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    opened = 0
    for ids, mask in docs:
        for start in range(0, len(ids), seq_len):
            # Copied, because a slice would keep its whole array in memory while the row is open.
            piece = ids[start : start + seq_len].copy(), mask[start : start + seq_len].copy()
            size = len(piece[0])
            at = bisect_left(spaces, (size, -1))
            if at < len(spaces):
                free, number = spaces.pop(at)
            else:
                if len(spaces) == limit:
                    yield _row(pieces.pop(spaces.pop(0)[1]), seq_len, pad_id)
                free, number = seq_len, opened
                pieces[number] = []
                opened += 1
            pieces[number].append(piece)
            if free == size:
                yield _row(pieces.pop(number), seq_len, pad_id)
            else:
                insort(spaces, (free - size, number))
    for number in sorted(pieces):
        yield _row(pieces[number], seq_len, pad_id)


def _row(pieces: list[tuple[np.ndarray, np.ndarray]], seq_len: int, pad_id: int) -> Row:
    row = Row(
        np.full(seq_len, pad_id, dtype=np.int32), np.full(seq_len, -1, dtype=np.int32), np.zeros(seq_len, dtype=bool)
    )
    at = 0
    for doc_id, (ids, mask) in enumerate(pieces):
        row.input_ids[at : at + len(ids)] = ids
        row.doc_ids[at : at + len(ids)] = doc_id
        row.loss_mask[at : at + len(ids)] = mask
        at += len(ids)
    return row


def position_ids(doc_ids: np.ndarray) -> np.ndarray:
    """Position of each token in its document: `doc_ids` [..., L] int -> [..., L] int64. Padding counts from 0 too."""
    index = np.arange(doc_ids.shape[-1], dtype=np.int64)
    starts = np.zeros(doc_ids.shape, dtype=np.int64)
    starts[..., 1:] = np.where(doc_ids[..., 1:] != doc_ids[..., :-1], index[1:], 0)
    np.maximum.accumulate(starts, axis=-1, out=starts)
    return index - starts
