"""The reference runtime: transformers' own forward, op by op."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.cache import SlotCache
from hildanext.masks import additive
from hildanext.runtimes.protocol import Batch


class EagerRuntime:
    """Any model that the loader accepts, on any device."""

    name = "eager"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.cache: SlotCache | None = None

    def allocate(self, slots: int, context: int) -> None:
        self.cache = None  # freed first: two caches may not fit
        self.cache = SlotCache(self.model.config.get_text_config().num_hidden_layers, slots, context)

    @torch.inference_mode()
    def body(self, batch: Batch) -> Tensor:
        assert self.cache is not None
        device, place = self.model.device, self.cache.place
        ids, positions, visible = (part.to(device) for part in batch[:3])
        place.keys = torch.arange(batch.length, device=device)
        place.rows = torch.arange(batch.slot, batch.slot + len(ids), device=device)[:, None]
        place.columns = torch.where(positions < 0, self.cache.layers[0].get_max_length(), positions)
        place.slot = batch.slot
        mask = additive(place.keys < visible[..., None], self.model.dtype)
        return self.forward(ids, positions.clamp(min=0), mask)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """ids, positions [B, W], mask [B, 1, W, K] -> hidden states [B, W, H]; keys and values go where `place` says."""
        return self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    def move(self, source: int, target: int, length: int) -> None:
        assert self.cache is not None
        with torch.inference_mode():
            self.cache.move(source, target, length)
