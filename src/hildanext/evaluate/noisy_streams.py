"""Several noisy streams share one clean stream in a forward.

A likelihood estimate masks few tokens of a long row, many times. A whole row per mask would be wasteful.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hildanext.diffusion.masks import additive, streams_mask
from hildanext.diffusion.noise import block_ids, block_starts
from hildanext.model.backbone import body
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.policy import compute_dtype


def denoise(lm: DiffusionLM, batch: Batch, masked: list[Tensor], block_size: int) -> Iterator[Tensor]:
    """Hidden states [S, H] of the masked positions, for each mask in `masked` [B, L] bool; equal to `lm.forward`'s.

    A noisy stream holds only the blocks that have a masked token. As many streams share a forward with x_0 as fit into
    its length. Example: with a context of 200 tokens, four draws of a 15-token continuation take one forward of 260
    tokens, where [x_t ; x_0] takes four forwards of 430.
    """
    length = batch.input_ids.shape[1]
    blocks = block_ids(batch.position_ids, block_size)
    columns, inside = _masked_blocks(batch, blocks, torch.stack(masked).any(0))
    if block_size >= length or columns.shape[1] == length:
        for mask in masked:
            noisy_ids = batch.input_ids.masked_fill(mask, lm.mask_token_id)
            yield lm(batch, noisy_ids, mask, block_size)
        return
    n_together = length // max(columns.shape[1], 1)
    for start in range(0, len(masked), n_together):
        yield from _shared_forward(lm, batch, masked[start : start + n_together], block_size, blocks, columns, inside)


def _masked_blocks(batch: Batch, blocks: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of each row that contain a wanted token: (columns [B, R] int64 in order, inside [B, R] bool).

    inside is False where a row has fewer than R such columns.
    """
    segment = block_starts(batch.doc_ids, blocks).cumsum(1) - 1
    hit = torch.zeros_like(segment).scatter_add_(1, segment, wanted.long()) > 0
    taken = hit.gather(1, segment)
    n = taken.sum(1)
    columns = taken.long().argsort(dim=1, descending=True, stable=True)[:, : int(n.max())]
    return columns, torch.arange(columns.shape[1], device=n.device) < n[:, None]


def _shared_forward(
    lm: DiffusionLM,
    batch: Batch,
    masked: list[Tensor],
    block_size: int,
    blocks: Tensor,
    columns: Tensor,
    inside: Tensor,
) -> Iterator[Tensor]:
    """One forward over [noisy streams ; x_0], n * R + L tokens; yields each mask's hidden states [S, H]."""
    n, width = len(masked), columns.shape[1]
    noisy = [batch.input_ids.masked_fill(mask, lm.mask_token_id).gather(1, columns) for mask in masked]
    docs = batch.doc_ids.gather(1, columns).masked_fill(~inside, -1)

    def joined(noisy_part: Tensor, whole: Tensor) -> Tensor:
        return torch.cat([noisy_part.repeat(1, n), whole], dim=1)

    streams = torch.arange(n + 1, device=columns.device)
    streams = streams.repeat_interleave(torch.tensor([width] * n + [batch.input_ids.shape[1]], device=columns.device))
    visible = streams_mask(joined(docs, batch.doc_ids), joined(blocks.gather(1, columns), blocks), streams, n)
    embeds = lm.embedding(torch.cat([*noisy, batch.input_ids], dim=1))
    hidden = body(
        lm.model,
        inputs_embeds=embeds,
        attention_mask=additive(visible, compute_dtype(embeds)),
        position_ids=joined(batch.position_ids.gather(1, columns), batch.position_ids),
    )
    for number, mask in enumerate(masked):
        row, place = (mask.gather(1, columns) & inside).nonzero(as_tuple=True)
        at = number * width + place
        if lm.convention == "shifted":
            # As in `DiffusionLM.forward`: x_0 predicts the first token of a block.
            column = columns[row, place]
            opens_block = batch.position_ids[row, column] % block_size == 0
            at = torch.where(opens_block, n * width + column, at) - 1
        yield hidden[row, at]
