"""The reference runtime: transformers' own forward, op by op."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.attention import use_grouped_attention
from hildanext.cache import Place, SlotCache
from hildanext.masks import additive
from hildanext.runtimes.protocol import Batch


class EagerRuntime:
    """Any model that the loader accepts, on any device."""

    name = "eager"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        use_grouped_attention(model)
        self.cache = SlotCache(0, 0, 0)

    @torch.inference_mode()
    def allocate(self, slots: int, context: int) -> None:
        self.cache = SlotCache(0, 0, 0)  # freed first: two caches may not fit
        self.cache = SlotCache(self.model.config.get_text_config().num_hidden_layers, slots, context)

    @torch.inference_mode()
    def body(self, batch: Batch) -> Tensor:
        device = self.model.device
        columns = batch.columns(self.cache.context).to(device)
        ids, positions, visible = (part.to(device) for part in batch[:3])
        keys = torch.arange(batch.length, device=device)
        rows = torch.arange(batch.slot, batch.slot + len(ids), device=device)[:, None]
        return self.forward(ids, positions, visible, Place(batch.slot, keys, rows, columns, batch.start))

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor, place: Place) -> Tensor:
        """ids, positions, visible [B, W] -> hidden states [B, W, H]; keys and values are read and written at `place`."""
        self.cache.at(place)
        return self.model.base_model(
            input_ids=ids,
            attention_mask=additive(place.keys < visible[..., None], self.model.dtype),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        self.cache.move(source, target, length)

    def close(self) -> None:
        """Free the cache."""
        self.cache = SlotCache(0, 0, 0)
