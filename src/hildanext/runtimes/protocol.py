"""What runs a model for the scheduler: the body behind a block cache, and the head."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One forward of B sequences in neighbouring slots, W tokens each. Padding: position -1, sees key 0 only."""

    ids: Tensor  # [B, W] int64
    positions: Tensor  # [B, W] int64, place in the text; -1 is padding
    visible: Tensor  # [B, W] int64: each token sees the text positions below this
    slot: int  # of the first sequence
    length: int  # K: the largest `visible`


class Runtime(Protocol):
    """A loaded model with its cache. `body` may hand out a buffer that the next call overwrites."""

    name: str

    def allocate(self, slots: int, context: int) -> None:
        """Make room for `slots` sequences of `context` tokens; what was stored is gone."""
        ...

    def body(self, batch: Batch) -> Tensor:
        """Store the keys and values of the batch's tokens in place; return hidden states [B, W, H]."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [P, V] of hidden states [P, H]."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        ...


def pad_batch(spans: list[tuple[list[int], int, list[int]]], slot: int) -> Batch:
    """Sequences as (tokens, start, visible) -> one Batch, shorter ones padded. An empty one is a slot that sits out."""
    width = max(len(tokens) for tokens, _, _ in spans)
    ids, positions, visible = [], [], []
    for tokens, start, sees in spans:
        padding = width - len(tokens)
        ids.append(tokens + [0] * padding)
        positions.append([*range(start, start + len(tokens)), *[-1] * padding])
        visible.append(sees + [1] * padding)
    return Batch(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(visible), slot, max(max(row) for row in visible)
    )
