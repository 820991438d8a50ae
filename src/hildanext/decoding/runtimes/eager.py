"""The reference runtime: transformers' own forward, operation by operation."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.decoding.cache import SlotCache, SlotView
from hildanext.decoding.runtimes.protocol import ForwardBatch
from hildanext.diffusion.masks import additive
from hildanext.model.decoding_attention import use_grouped_attention


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
        self.cache = SlotCache(0, 0, 0)

    @torch.inference_mode()
    def allocate(self, slots: int, context: int) -> None:
        self.cache = SlotCache(0, 0, 0)  # frees the old cache first: memory may not suffice for two
        self.cache = SlotCache(self.model.config.get_text_config().num_hidden_layers, slots, context)

    def body(self, batch: ForwardBatch) -> Tensor:
        return self.forward(*self.inputs(batch))

    def inputs(self, batch: ForwardBatch) -> tuple[Tensor, Tensor, Tensor | None, SlotView]:
        """The arguments of `forward`, on the model's device."""
        device, visible, rows, columns = self.device, None, None, None
        if not batch.sees_all:
            visible = batch.visible.to(device)
        if batch.start is None:
            rows = torch.arange(batch.slot, batch.slot + len(batch.ids), device=device)[:, None]
            columns = batch.columns(self.cache.context).to(device)
        place = SlotView(batch.slot, torch.arange(batch.length, device=device), rows, columns, batch.start)
        return batch.ids.to(device), batch.positions.to(device), visible, place

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor | None, place: SlotView) -> Tensor:
        """ids, positions, visible [B, W] int64 -> hidden states [B, W, H]. Keys and values are cached at `place`.

        `visible` None: every token attends to all keys.
        """
        self.cache.at(place)
        if visible is None:
            mask = torch.zeros(1, 1, 1, len(place.keys), dtype=self.dtype, device=ids.device)
        else:
            mask = additive(place.keys < visible[..., None], self.dtype)
        return self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state

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
