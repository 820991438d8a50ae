"""Keys and values of finished blocks: one slot a sequence, allocated once, written in place.

It is a `Cache` of transformers, so any stock model fills it by itself; where the keys of a forward go is set beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class SlotView:
    """Where a forward of B sequences, W tokens each, reads and writes."""

    slot: int  # the sequences lie in neighbouring slots from here
    keys: Tensor  # [K] 0..K-1: the positions that are read
    rows: Tensor | None  # [B, 1] slot of each sequence
    columns: Tensor | None  # [B, W] text positions; the slot's last one for padding
    start: int | None  # instead of rows and columns: position of the first token, for one sequence without padding


class SlotLayer(CacheLayerMixin):
    """Keys and values [slots, H, context + 1, D] of one layer; the last place takes what is padding."""

    is_compileable = True
    is_croppable = False

    def __init__(self, slots: int, context: int) -> None:
        super().__init__()
        self.slots, self.context = slots, context
        self.place: SlotView | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self.slots, states.shape[1], self.context + 1, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, W, D] where `place` says; return views [B, H, K, D] of what those slots hold."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.place is not None
        place, n, length = self.place, key_states.shape[0], self.place.keys.shape[0]
        mine = slice(place.slot, place.slot + n)
        if place.start is not None:
            here = slice(place.start, place.start + key_states.shape[2])
            self.keys[mine, :, here] = key_states
            self.values[mine, :, here] = value_states
        else:
            self.keys[place.rows, :, place.columns] = key_states.transpose(1, 2)
            self.values[place.rows, :, place.columns] = value_states.transpose(1, 2)
        return self.keys[mine, :, :length], self.values[mine, :, :length]

    def get_seq_length(self) -> int:
        return self.get_mask_sizes(0)[0] if self.place is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.place is not None
        return self.place.keys.shape[0], 0

    def get_max_length(self) -> int:
        return self.context


class SlotCache(Cache):
    """`slots` sequences of up to `context` tokens, side by side."""

    def __init__(self, n_layers: int, slots: int, context: int) -> None:
        self.context = context
        self.slot_layers = [SlotLayer(slots, context) for _ in range(n_layers)]
        super().__init__(layers=list(self.slot_layers))

    def at(self, place: SlotView) -> None:
        """Say where the next forward reads and writes."""
        for layer in self.slot_layers:
            layer.place = place

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another."""
        for stored in self._states():
            stored[target, :, :length] = stored[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for stored in self._states():
            stored[[one, other], :, :length] = stored[[other, one], :, :length]

    def _states(self) -> list[Tensor]:
        states = [states for layer in self.slot_layers for states in (layer.keys, layer.values)]
        return [one for one in states if one is not None]  # none before the first forward
