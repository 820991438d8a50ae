"""The protocol between the scheduler and the code that runs the model: a batch of tokens, hidden states, logits."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class ForwardBatch(NamedTuple):
    """One forward of B sequences in neighbouring slots, W tokens each. Padding is at position 0 and sees key 0 only."""

    ids: Tensor  # [B, W] int64
    positions: Tensor  # [B, W] int64: text position
    visible: Tensor  # [B, W] int64: each token attends to the text positions below this
    slot: int  # slot of the first sequence
    length: int  # K: the largest `visible`
    widths: list[int]  # number of tokens of each sequence, padding excluded
    start: int | None  # position of the first token of a single sequence; None for several sequences
    sees_all: bool  # every token attends to all K positions: no mask is needed

    def columns(self, trash: int) -> Tensor:
        """[B, W] int64: the position in its slot where each token's keys are written; `trash` for padding."""
        columns = self.positions.clone()
        for row, width in enumerate(self.widths):
            columns[row, width:] = trash
        return columns


class Runtime(Protocol):
    """A loaded model with its key-value cache. The scheduler calls `body` and `head` inside torch.inference_mode."""

    name: str
    torch_threads: int | None  # torch threads during a step; None: all of them
    resting_tokens: int | None  # tokens whose keys and values are kept while nothing runs; None: all of them

    def allocate(self, slots: int, context: int) -> None:
        """Allocate `slots` slots of `context` tokens. Drops all cached keys and values."""
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


def widen(batch: ForwardBatch, slots: int, width: int) -> ForwardBatch:
    """Pad a batch to a forward of the slots 0 to `slots` - 1, `width` tokens each."""
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
    """A batch of sequences, each (tokens, start, visible), in the slots from `slot` on. Shorter ones are padded.

    An empty sequence is a slot without work. `visible` must not decrease along a sequence.
    """
    width = max(len(tokens) for tokens, _, _ in spans)
    length = max((visible[-1] for _, _, visible in spans if visible), default=1)
    ids, positions, visibles = [], [], []
    for tokens, start, visible in spans:
        padding = [0] * (width - len(tokens))
        ids.append(tokens + padding)
        positions.append([*range(start, start + len(tokens)), *padding])
        visibles.append(visible + [1] * len(padding))
    rows = torch.tensor([ids, positions, visibles])  # one conversion from lists is faster than three
    return ForwardBatch(
        ids=rows[0],
        positions=rows[1],
        visible=rows[2],
        slot=slot,
        length=length,
        widths=[len(tokens) for tokens, _, _ in spans],
        start=spans[0][1] if len(spans) == 1 else None,
        sees_all=all(visible[0] == length for visible in visibles),
    )
