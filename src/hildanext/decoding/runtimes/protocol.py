"""What runs a model for the scheduler: the body behind a block cache, and the head."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class ForwardBatch(NamedTuple):
    """One forward of B sequences in neighbouring slots, W tokens each. Padding has position 0 and sees key 0 only."""

    ids: Tensor  # [B, W] int64
    positions: Tensor  # [B, W] int64, place in the text
    visible: Tensor  # [B, W] int64: each token sees the text positions below this
    slot: int  # of the first sequence
    length: int  # K: the largest `visible`
    widths: list[int]  # tokens of each sequence that are not padding
    start: int | None  # position of the first token where one sequence runs alone, None for several
    sees_all: bool  # every token sees all K positions: nothing to mask

    def columns(self, trash: int) -> Tensor:
        """[B, W]: where the keys of each token go in its slot; padding goes to `trash`."""
        columns = self.positions.clone()
        for row, width in enumerate(self.widths):
            columns[row, width:] = trash
        return columns


class Runtime(Protocol):
    """A loaded model with its cache. `body` may hand out a buffer that the next call overwrites.

    `body` and `head` are called inside torch.inference_mode, which the scheduler enters once a step.
    """

    name: str
    torch_threads: int | None  # what torch computes with during a step; None: with all it has

    def allocate(self, slots: int, context: int) -> None:
        """Make room for `slots` sequences of `context` tokens; what was stored is gone."""
        ...

    def body(self, batch: ForwardBatch) -> Tensor:
        """Store the keys and values of the batch's tokens in place; return hidden states [B, W, H]."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [P, V] of hidden states [P, H]."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        ...

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        ...

    def close(self) -> None:
        """Give back what it holds; `allocate` starts it again."""
        ...


def widen(batch: ForwardBatch, slots: int, width: int) -> ForwardBatch:
    """The same work in a forward of all slots from 0 on, `width` tokens each: what is new is padding."""
    n, old = batch.ids.shape
    frame = (0, width - old, batch.slot, slots - batch.slot - n)
    grow = nn.functional.pad
    widths = [0] * batch.slot + batch.widths + [0] * (slots - batch.slot - n)
    visible = grow(batch.visible, frame, value=1)
    return batch._replace(
        ids=grow(batch.ids, frame),
        positions=grow(batch.positions, frame),
        visible=visible,
        slot=0,
        widths=widths,
        start=None,
        sees_all=False,
    )


def pad_batch(spans: list[tuple[list[int], int, list[int]]], slot: int) -> ForwardBatch:
    """Sequences as (tokens, start, visible) -> one Batch, shorter ones padded. An empty one is a slot that sits out.

    `visible` never falls along a sequence, as later blocks see more.
    """
    width = max(len(tokens) for tokens, _, _ in spans)
    length = max((sees[-1] for _, _, sees in spans if sees), default=1)
    ids, positions, visible = [], [], []
    for tokens, start, sees in spans:
        padding = [0] * (width - len(tokens))
        ids.append(tokens + padding)
        positions.append([*range(start, start + len(tokens)), *padding])
        visible.append(sees + [1] * len(padding))
    rows = torch.tensor([ids, positions, visible])  # one tensor made from lists costs less than three
    return ForwardBatch(
        ids=rows[0],
        positions=rows[1],
        visible=rows[2],
        slot=slot,
        length=length,
        widths=[len(tokens) for tokens, _, _ in spans],
        start=spans[0][1] if len(spans) == 1 else None,
        sees_all=all(sees[0] == length for sees in visible),
    )
