"""The protocol between the scheduler and the code that runs the model: a batch of tokens, hidden states, logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn


class GroupRows(NamedTuple):
    """What a gated model's forward adds to a sequence of tokens, one entry for each.

    The keys of a group's rows stand behind those of the text: at columns of their own, not at their text positions.
    """

    positions: list[int]  # text position
    own: list[tuple[int, int]]  # columns of the token's group, [first, end); empty for clean tokens
    gate: list[bool]  # whether the adapter acts on the token


class ForwardBatch(NamedTuple):
    """One forward of B sequences in neighbouring slots, W tokens each. Padding is at position 0 and sees key 0 only.

    The keys of a sequence's tokens are at consecutive columns of its slot.
    """

    ids: Tensor  # [B, W] int64
    positions: Tensor  # [B, W] int64: text position
    visible: Tensor  # [B, W] int64: each token attends to the columns below this
    slot: int  # slot of the first sequence
    length: int  # K: the largest `visible`
    widths: list[int]  # number of tokens of each sequence, padding excluded
    start: int | None  # position of the first token of a single sequence; None for several sequences
    sees_all: bool  # every token attends to all K positions: no mask is needed
    starts: list[int]  # column of each sequence's first token
    own: Tensor | None = None  # [B, W, 2] int64: columns [first, end) of the token's group, which it attends to as well
    gate: Tensor | None = None  # [B, W] bool: whether a gated adapter acts on the token; None: on no token

    def columns(self, trash: int) -> Tensor:
        """[B, W] int64: the column of its slot where each token's keys are written; `trash` for padding."""
        columns = torch.tensor(self.starts)[:, None] + torch.arange(self.ids.shape[1])
        for row, width in enumerate(self.widths):
            columns[row, width:] = trash
        return columns

    def gated(self) -> ForwardBatch:
        """The same batch with `own` and `gate`, empty if it has none: the shapes of a fixed graph of a gated model."""
        if self.gate is not None:
            return self
        shape = self.ids.shape
        return self._replace(own=torch.zeros(*shape, 2, dtype=torch.long), gate=torch.zeros(shape, dtype=torch.bool))


Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")


def within(keys: Array, own: Array) -> Array:
    """keys [K] or [B, 1, K], own [B, W, 2] -> [B, W, K] bool: whether a key's column is in [first, end)."""
    return (keys >= own[..., :1]) & (keys < own[..., 1:])


class Runtime(Protocol):
    """A loaded model with its key-value cache. The scheduler calls `body` and `head` inside torch.inference_mode."""

    name: str
    torch_threads: int | None  # torch threads during a step; None: all of them
    resting_tokens: int | None  # tokens whose keys and values are kept while nothing runs; None: all of them

    def allocate(self, slots: int, context: int) -> None:
        """Allocate `slots` slots of `context` tokens. Drops all cached keys and values."""
        ...

    def prepare(self, width: int) -> None:
        """Make the graph for passes of `width` tokens of one sequence, if it is one that is left until a request needs it."""
        ...

    def body(self, batch: ForwardBatch) -> Tensor:
        """Run the batch and cache its keys and values. Returns hidden states [B, W, H], valid until the next call."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [P, V] of hidden states [P, H]."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        ...

    def swap(self, slot: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        ...

    def erase(self, slot: int) -> None:
        """Set all keys and values of a slot to zero. A NaN would reach later sequences even through the mask."""
        ...

    def rest(self, lengths: list[int]) -> None:
        """Free memory until the next forward. The first lengths[i] positions of slot i stay cached.

        Called only if `resting_tokens` is set.
        """
        ...

    def close(self) -> None:
        """Free the cache. `allocate` makes the runtime usable again."""
        ...


def widen(batch: ForwardBatch, slots: int, width: int, first: int = 0) -> ForwardBatch:
    """Pad a batch to a forward of `slots` slots from `first` on, `width` tokens each."""
    n, old = batch.ids.shape
    before = batch.slot - first
    after = slots - before - n
    frame = (0, width - old, before, after)
    grow = nn.functional.pad
    widths = [0] * before + batch.widths + [0] * after
    visible = grow(batch.visible, frame, value=1)
    starts = [0] * before + batch.starts + [0] * after
    return batch._replace(
        ids=grow(batch.ids, frame),
        positions=grow(batch.positions, frame),
        visible=visible,
        slot=first,
        widths=widths,
        start=None,
        sees_all=False,
        starts=starts,
        own=None if batch.own is None else grow(batch.own, (0, 0, *frame)),
        gate=None if batch.gate is None else grow(batch.gate, frame),
    )


def pad_batch(
    spans: Sequence[tuple[list[int], int, list[int]]], slot: int, groups: Sequence[GroupRows | None] = ()
) -> ForwardBatch:
    """A batch of sequences, each (tokens, start, visible), in the slots from `slot` on. Shorter ones are padded.

    An empty sequence is a slot without work. groups: of each sequence, for gated models. Without groups, `visible` must
    not decrease along a sequence.
    """
    width = max(len(tokens) for tokens, _, _ in spans)
    length = max((visible[-1] for _, _, visible in spans if visible), default=1)
    is_gated = any(rows is not None for rows in groups)
    ids, positions, visibles = [], [], []
    for row, (tokens, start, visible) in enumerate(spans):
        padding = [0] * (width - len(tokens))
        own = groups[row] if is_gated else None
        ids.append(tokens + padding)
        positions.append([*(range(start, start + len(tokens)) if own is None else own.positions), *padding])
        visibles.append(visible + [1] * len(padding))
        if own is not None:
            length = max(length, start + len(tokens))
    rows = torch.tensor([ids, positions, visibles])  # one conversion from lists is faster than three
    batch = ForwardBatch(
        ids=rows[0],
        positions=rows[1],
        visible=rows[2],
        slot=slot,
        length=length,
        widths=[len(tokens) for tokens, _, _ in spans],
        start=spans[0][1] if len(spans) == 1 else None,
        sees_all=not is_gated and all(visible[0] == length for visible in visibles),
        starts=[start for _, start, _ in spans],
    )
    if not is_gated:
        return batch
    own_columns, gate = (
        torch.zeros(len(spans), width, 2, dtype=torch.long),
        torch.zeros(len(spans), width, dtype=torch.bool),
    )
    for row, of_row in enumerate(groups):
        if of_row is not None:
            own_columns[row, : len(of_row.own)] = torch.tensor(of_row.own)
            gate[row, : len(of_row.gate)] = torch.tensor(of_row.gate)
    return batch._replace(own=own_columns, gate=gate)
