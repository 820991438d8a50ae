"""Keys and values of finished blocks: one slot a sequence, allocated once, written in place.

It is a `Cache` of transformers, so any stock model fills it by itself; where the keys of a forward go is set beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Place:
    """Where a forward of B sequences, W tokens each, reads and writes."""

    rows: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.long))  # [B, 1] slot of each
    columns: Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.long))  # [B, W] text positions
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # [K] 0..K-1: what is read
    slot: int = 0  # the B sequences lie in neighbouring slots from here


class SlotLayer(CacheLayerMixin):
    """Keys and values [slots, H, context + 1, D] of one layer; the last place takes what is padding."""

    is_compileable = True
    is_croppable = False

    def __init__(self, slots: int, context: int, place: Place) -> None:
        super().__init__()
        self.slots, self.context, self.place = slots, context, place

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
        place, n, length = self.place, key_states.shape[0], self.place.keys.shape[0]
        self.keys[place.rows, :, place.columns] = key_states.transpose(1, 2)
        self.values[place.rows, :, place.columns] = value_states.transpose(1, 2)
        mine = slice(place.slot, place.slot + n)
        return self.keys[mine, :, :length], self.values[mine, :, :length]

    def get_seq_length(self) -> int:
        return self.place.keys.shape[0] - self.place.columns.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.keys.shape[0], 0

    def get_max_length(self) -> int:
        return self.context


class SlotCache(Cache):
    """`slots` sequences of up to `context` tokens, side by side."""

    def __init__(self, n_layers: int, slots: int, context: int) -> None:
        self.place = Place()
        self.slot_layers = [SlotLayer(slots, context, self.place) for _ in range(n_layers)]
        super().__init__(layers=list(self.slot_layers))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another."""
        for layer in self.slot_layers:
            for stored in (layer.keys, layer.values):
                if stored is not None:
                    stored[target, :, :length] = stored[source, :, :length]
