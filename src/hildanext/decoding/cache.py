"""The key-value cache: one slot for each sequence, allocated once and written in place.

It is a `Cache` of transformers, so a stock model reads and writes it in its own forward. `SlotCache.at` sets the
slots and positions beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class SlotView:
    """The slots and positions that a forward of B sequences, W tokens each, reads and writes."""

    slot: int  # slot of the first sequence; the others follow in neighbouring slots
    keys: Tensor  # [K] 0..K-1: the positions that are read
    rows: Tensor | None  # [B, 1] slot of each sequence
    columns: Tensor | None  # [B, W] position of each token; for padding the slot's extra last one
    start: int | None  # in place of rows and columns: the first token's position, for one sequence without padding


class SlotLayer(CacheLayerMixin):
    """Keys and values [slots, H, context + 1, D] of one layer. Padding is written to the extra last position."""

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
        """Write new states [B, H, W, D] at `place`. Returns views [B, H, K, D] of the slots' keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.place is not None
        place, n, length = self.place, key_states.shape[0], self.place.keys.shape[0]
        slots = slice(place.slot, place.slot + n)
        if place.start is not None:
            columns = slice(place.start, place.start + key_states.shape[2])
            self.keys[slots, :, columns] = key_states
            self.values[slots, :, columns] = value_states
        else:
            self.keys[place.rows, :, place.columns] = key_states.transpose(1, 2)
            self.values[place.rows, :, place.columns] = value_states.transpose(1, 2)
        return self.keys[slots, :, :length], self.values[slots, :, :length]

    def get_seq_length(self) -> int:
        return self.get_mask_sizes(0)[0] if self.place is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.place is not None
        return self.place.keys.shape[0], 0

    def get_max_length(self) -> int:
        return self.context


class SlotCache(Cache):
    """`slots` sequences of up to `context` tokens each."""

    def __init__(self, n_layers: int, slots: int, context: int) -> None:
        self.context = context
        self.slot_layers = [SlotLayer(slots, context) for _ in range(n_layers)]
        super().__init__(layers=list(self.slot_layers))

    def at(self, place: SlotView) -> None:
        """Set the slots and positions of the next forward."""
        for layer in self.slot_layers:
            layer.place = place

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for states in self._states():
            states[target, :, :length] = states[source, :, :length]

    def swap(self, slot: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for states in self._states():
            states[[slot, other], :, :length] = states[[other, slot], :, :length]

    def erase(self, slot: int) -> None:
        """Set all keys and values of a slot to zero."""
        for states in self._states():
            states[slot] = 0

    def _states(self) -> list[Tensor]:
        """Keys and values of all layers; empty before the first forward."""
        states = [states for layer in self.slot_layers for states in (layer.keys, layer.values)]
        return [tensor for tensor in states if tensor is not None]
