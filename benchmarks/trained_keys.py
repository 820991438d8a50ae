"""Trained keys and values a layer in place of trained weights, as in BiTA (arXiv 2401.12522), for `gated.py`.

Only rows of groups see them. They are not stored with the adapter: the comparison is of held-out accuracy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hildanext.model import gate, loading


@contextlib.contextmanager
def trained_keys(n: int) -> Iterator[None]:
    """Within the block, a new gated adapter trains n keys and values a layer besides its own parameters; 0: none."""
    if not n:
        yield
        return
    states: list[Tensor] = []  # [layers, 2, key heads, n, D] of the model that was made last
    behind, mask_of, inject = gate._Behind, gate.group_mask, gate.inject_gated

    class BehindTrained(behind):  # type: ignore[misc, valid-type]
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **options: Any) -> Any:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *rest, **options)
            own = states[-1][layer_idx].to(key_states.dtype)[:, None].expand(-1, len(key_states), -1, -1, -1)
            return tuple(torch.cat([new, old], 2) for new, old in zip(own, found, strict=True))

    def seen(*given: Any) -> Tensor:
        mask: Tensor = mask_of(*given)
        return torch.cat([torch.ones(*mask.shape[:2], n, dtype=torch.bool, device=mask.device), mask], 2)

    def made(model: PreTrainedModel, *given: Any, **options: Any) -> list[str]:
        targets = inject(model, *given, **options)
        config = model.config.get_text_config()
        dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, n, dim)
        model.trained_keys = nn.Parameter(0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        states.append(model.trained_keys)
        return targets

    assert issubclass(behind, Cache)
    with (
        mock.patch.multiple(gate, _Behind=BehindTrained, group_mask=seen),
        mock.patch.object(loading, "inject_gated", made),
    ):
        yield
