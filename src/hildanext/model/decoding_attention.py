"""Attention for decoding: query heads that share a key head are stacked, so that stored keys are not copied for each.

transformers repeats keys and values for grouped-query attention whenever there is a mask. Behind a long cache that copying
costs more than the attention itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "hildanext_grouped"
# What else an architecture may ask of its attention; those that do get transformers' own.
EXTRAS = ("softcap", "sliding_window", "s_aux", "position_bias")


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `sdpa` of transformers. query [B, Hq, W, D]; key, value [B, Hkv, K, D]; mask [B, 1, W, K] or [1, 1, 1, K] additive.

    Returns [B, W, Hq, D]. Query head h belongs to key head h // (Hq / Hkv); the group's queries stand one behind the other.
    """
    batch, n_heads, width, dim = query.shape
    n_kv = key.shape[1]
    groups = n_heads // n_kv
    plain = attention_mask is not None and attention_mask.shape[1] == 1 and dropout == 0.0
    if not plain or any(kwargs.get(name) is not None for name in EXTRAS):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    assert attention_mask is not None
    stacked = query.reshape(batch, n_kv, groups * width, dim)
    mask = attention_mask.repeat(1, 1, groups, 1) if attention_mask.shape[2] > 1 else attention_mask
    output = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, n_heads, width, value.shape[-1]).transpose(1, 2).contiguous(), None


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is SDPA decode with `grouped_attention`; another implementation stays."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, cast(Any, grouped_attention))
        model.set_attn_implementation(NAME)
