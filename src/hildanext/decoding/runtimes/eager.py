"""The reference runtime: transformers' own forward, operation by operation."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.decoding.cache import SlotCache, SlotView
from hildanext.decoding.runtimes.protocol import ForwardBatch, within
from hildanext.diffusion.masks import additive
from hildanext.model.decoding_attention import use_grouped_attention
from hildanext.model.gated_linear import find_gate


class EagerRuntime:
    """Runs any model that the loader accepts, on any device."""

    name = "eager"
    torch_threads: int | None = None
    resting_tokens: int | None = None  # its memory is allocated once

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        use_grouped_attention(model)
        # Kept because the model searches its modules each time for these.
        self.device, self.dtype, self.lm_head = model.device, model.dtype, model.get_output_embeddings()
        self.gate = find_gate(model)
        self.cache = SlotCache(0, 0, 0)

    @torch.inference_mode()
    def allocate(self, slots: int, context: int) -> None:
        self.cache = SlotCache(0, 0, 0)  # frees the old cache first: memory may not suffice for two
        self.cache = SlotCache(self.model.config.get_text_config().num_hidden_layers, slots, context)

    def body(self, batch: ForwardBatch) -> Tensor:
        return self.forward(*self.inputs(batch))

    def inputs(
        self, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor, Tensor | None, SlotView, Tensor | None, Tensor | None]:
        """The arguments of `forward`, on the model's device."""
        device, visible, rows, columns = self.device, None, None, None
        if not batch.sees_all:
            visible = batch.visible.to(device)
        own, gate = (None if tensor is None else tensor.to(device) for tensor in (batch.own, batch.gate))
        if batch.start is None:
            rows = torch.arange(batch.slot, batch.slot + len(batch.ids), device=device)[:, None]
            columns = batch.columns(self.cache.context).to(device)
        place = SlotView(batch.slot, torch.arange(batch.length, device=device), rows, columns, batch.start)
        return batch.ids.to(device), batch.positions.to(device), visible, place, own, gate

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        place: SlotView,
        own: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """ids, positions, visible [B, W] int64 -> hidden states [B, W, H]. Keys and values are cached at `place`.

        `visible` None: every token attends to all keys. own, gate: see `ForwardBatch`.
        """
        self.cache.at(place)
        if self.gate is not None:
            self.gate.rows = None if gate is None else gate[..., None].to(self.dtype)
        if visible is None:
            mask = torch.zeros(1, 1, 1, len(place.keys), dtype=self.dtype, device=ids.device)
        else:
            seen = place.keys < visible[..., None]
            mask = additive(seen if own is None else seen | within(place.keys, own), self.dtype)
        hidden: Tensor = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        if self.gate is not None:
            self.gate.rows = None  # between forwards the model is its base
        return hidden

    def prepare(self, width: int) -> None:
        """Nothing to make: every width runs as it comes."""

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    @torch.inference_mode()
    def swap(self, slot: int, other: int, length: int) -> None:
        self.cache.swap(slot, other, length)

    @torch.inference_mode()
    def erase(self, slot: int) -> None:
        self.cache.erase(slot)

    def rest(self, lengths: list[int]) -> None:
        """Nothing to free: all tokens stay cached."""

    def close(self) -> None:
        self.cache = SlotCache(0, 0, 0)
