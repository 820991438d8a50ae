"""Attention masks: True means that a query may attend to a key. `additive` converts them for the model.

Sources: LLaDA2.0 (arXiv 2512.15745) eq. 3 for the block-diffusion mask, eq. 4 for the document mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _same_document(doc_ids: Tensor) -> Tensor:
    """Pairs of the same document; a padding token (-1) attends to itself only. [B, L] int64 -> [B, L, L] bool."""
    same = doc_ids[:, :, None] == doc_ids[:, None, :]
    same &= (doc_ids >= 0)[:, :, None]
    return same | torch.eye(doc_ids.shape[1], dtype=torch.bool, device=doc_ids.device)


def document_mask(doc_ids: Tensor) -> Tensor:
    """MDLM (full-sequence diffusion): a token attends to its whole document (eq. 4). [B, L] int64 -> [B, L, L] bool."""
    return _same_document(doc_ids)


def block_causal_mask(doc_ids: Tensor, block_ids: Tensor) -> Tensor:
    """Clean stream and decoding: a token attends to its block and earlier blocks. [B, L] int64 x2 -> [B, L, L] bool."""
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


def streams_mask(doc_ids: Tensor, block_ids: Tensor, streams: Tensor, clean: int) -> Tensor:
    """`training_mask` for a clean stream and several noisy streams. A stream may hold any complete blocks of the row.

    doc_ids, block_ids [B, W] int64; streams [W] int64: the stream of each token; clean: the number of the clean stream.
    Noisy streams do not attend to each other. Returns [B, W, W] bool without empty rows.
    """
    query, key = block_ids[:, :, None], block_ids[:, None, :]
    from_clean, to_clean = (streams == clean)[:, None], (streams == clean)[None, :]
    own = (streams[:, None] == streams[None, :]) & (query == key)
    seen = torch.where(to_clean, (query > key) | (from_clean & (query == key)), own)
    return _same_document(doc_ids) & seen


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Q, K] bool -> [B, 1, Q, K] with 0 for True and the minimum of `dtype` for False.

    The model never gets a boolean mask: eager attention in transformers would add it to the scores.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


class Pieces(NamedTuple):
    """A training mask divided into pieces: a chunk of consecutive queries with the keys that they may attend to.

    The rows are concatenated to N = B * L tokens (2N with the clean stream). Piece p has queries [p*c, (p+1)*c) of each
    stream, noisy queries first, and the next `sizes[p]` entries of `keys`.
    """

    chunk: int  # c
    streams: int  # 2: [x_t ; x_0]; 1: x_t alone
    keys: Tensor  # [sum(sizes)] int64: flat index of a key in [B, streams * L]
    sizes: list[int]
    masks: list[Tensor]  # [streams * c, sizes[p]] bool each; additive after `Pieces.additive`

    def additive(self, dtype: torch.dtype, groups: int) -> Pieces:
        """With additive masks [1, 1, groups * streams * c, sizes[p]], repeated for the query heads of a key head.

        Made once for all layers; otherwise each layer would store its own for the backward pass.
        """
        return self._replace(masks=[additive(mask[None], dtype).repeat(1, 1, groups, 1) for mask in self.masks])

    @property
    def scores(self) -> int:
        """Number of scores computed per head. The dense mask computes B * (streams * L)^2."""
        return sum(mask.shape[-2] * mask.shape[-1] for mask in self.masks)


def _run_bounds(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end index of the run of equal values around each position. ids [N] int64 -> two [N] int64."""
    new = torch.ones_like(ids, dtype=torch.bool)
    new[1:] = ids[1:] != ids[:-1]
    starts = new.nonzero()[:, 0]
    run = new.cumsum(0) - 1
    ends = torch.cat([starts[1:], starts.new_tensor([len(ids)])])
    return starts[run], ends[run]


def training_pieces(doc_ids: Tensor, block_ids: Tensor | None, chunk: int = 128) -> Pieces:
    """`training_mask` (or `document_mask` if block_ids is None) as pieces. [B, L] int64 -> Pieces on the same device.

    A query attends to keys of its own document only. A chunk of queries therefore needs one contiguous range of clean
    keys (from the start of its first document) and one of noisy keys (its blocks); no other scores are computed.
    """
    n_rows, length = doc_ids.shape
    device, doc_ids = doc_ids.device, doc_ids.cpu()
    n = n_rows * length
    # Number the documents through all rows; each padding token is a document of its own.
    row = torch.arange(n_rows).repeat_interleave(length)
    flat = doc_ids.flatten()
    docs = torch.where(flat < 0, -1 - torch.arange(n), flat + row * (int(flat.max()) + 1))
    doc_start, doc_end = _run_bounds(docs)
    blocks = torch.zeros(n, dtype=torch.int64) if block_ids is None else block_ids.cpu().flatten()
    block_start, block_end = _run_bounds(docs * (int(blocks.max()) + 1) + blocks)
    streams = 1 if block_ids is None else 2
    noisy_at = row * streams * length + torch.arange(n) % length
    keys, sizes, masks = [], [], []
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        query = torch.arange(start, end)
        near = torch.arange(int(block_start[start]), int(block_end[end - 1]))
        if streams == 1:
            near = torch.arange(int(doc_start[start]), int(doc_end[end - 1]))
            keys.append(noisy_at[near])
            masks.append(docs[query][:, None] == docs[near])
        else:
            far = torch.arange(int(doc_start[start]), int(block_end[end - 1]))
            same_near, same_far = (docs[query][:, None] == docs[seen] for seen in (near, far))
            own, far_block = blocks[query][:, None], blocks[far]
            noisy = torch.cat([same_near & (own == blocks[near]), same_far & (own > far_block)], dim=1)
            clean = torch.cat([torch.zeros_like(same_near), same_far & (own >= far_block)], dim=1)
            keys += [noisy_at[near], noisy_at[far] + length]
            masks.append(torch.cat([noisy, clean]))
        sizes.append(masks[-1].shape[1])
    return Pieces(chunk, streams, torch.cat(keys).to(device), sizes, [mask.to(device) for mask in masks])
