"""Attention for decoding: query heads that share a key head are stacked, so that cached keys are not copied for each.

For grouped-query attention with a mask, transformers repeats keys and values. With a long cache, the copies take
longer than the attention itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "hildanext_grouped"
# Features that `grouped_attention` lacks. Layers that use one get the attention of transformers.
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
    """The same result as `sdpa` of transformers. Query head h uses key head h // (Hq / Hkv).

    query [B, Hq, W, D]; key, value [B, Hkv, K, D]; attention_mask [B, 1, W, K] or [1, 1, 1, K], additive.
    Returns [B, W, Hq, D].
    """
    batch, n_heads, width, dim = query.shape
    n_kv = key.shape[1]
    groups = n_heads // n_kv
    plain = attention_mask is not None and attention_mask.shape[1] == 1 and dropout == 0.0
    if not plain or any(kwargs.get(name) is not None for name in EXTRAS):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    assert attention_mask is not None
    # The queries of a group are concatenated along the width.
    stacked = query.reshape(batch, n_kv, groups * width, dim)
    mask = attention_mask.repeat(1, 1, groups, 1) if attention_mask.shape[2] > 1 else attention_mask
    output = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, n_heads, width, value.shape[-1]).transpose(1, 2).contiguous(), None


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Switch a model with SDPA attention to `grouped_attention`. Other implementations are kept."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, cast(Any, grouped_attention))
        AttentionMaskInterface.register(NAME, cast(Any, sdpa_mask))  # for forwards of the base without a mask of ours
        model.set_attn_implementation(NAME)
