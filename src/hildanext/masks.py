"""Attention masks: True means "this query may see this key". They become additive masks at the model's door.

Sources: LLaDA2.0 (arXiv 2512.15745) eq. 3 for the block-diffusion mask, eq. 4 for the document mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _same_document(doc_ids: Tensor) -> Tensor:
    """[B, L] -> [B, L, L] bool: same document; a padding token (-1) sees itself only."""
    same = doc_ids[:, :, None] == doc_ids[:, None, :]
    same &= (doc_ids >= 0)[:, :, None]
    return same | torch.eye(doc_ids.shape[1], dtype=torch.bool, device=doc_ids.device)


def document_mask(doc_ids: Tensor) -> Tensor:
    """MDLM (full diffusion): every token sees its whole document (eq. 4). [B, L] int64 -> [B, L, L] bool."""
    return _same_document(doc_ids)


def block_causal_mask(doc_ids: Tensor, block_ids: Tensor) -> Tensor:
    """The clean stream and decoding: a token sees its block and the blocks before it. [B, L] x2 -> [B, L, L] bool."""
    return _same_document(doc_ids) & (block_ids[:, :, None] >= block_ids[:, None, :])


def training_mask(doc_ids: Tensor, block_ids: Tensor) -> Tensor:
    """Block-diffusion training mask over [x_t ; x_0] (eq. 3). [B, L] int64 x2 -> [B, 2L, 2L] bool, no empty row.

    Within one document, with b() the block: x_t -> x_t iff b(i) = b(j); x_t -> x_0 iff b(i) > b(j);
    x_0 -> x_0 iff b(i) >= b(j); x_0 -> x_t never.
    """
    same = _same_document(doc_ids)
    query, key = block_ids[:, :, None], block_ids[:, None, :]
    noisy_rows = torch.cat([same & (query == key), same & (query > key)], dim=2)
    clean_rows = torch.cat([torch.zeros_like(same), same & (query >= key)], dim=2)
    return torch.cat([noisy_rows, clean_rows], dim=1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Q, K] bool -> [B, 1, Q, K] of 0 (may see) and the dtype's minimum (may not).

    Boolean masks are not passed on: eager attention in transformers adds them (error 0.16 on random weights).
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]
