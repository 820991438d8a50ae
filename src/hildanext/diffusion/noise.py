"""The forward process: clean tokens x_0 -> noisy tokens x_t, by masking (M2T) and by wrong tokens (T2T).

Random numbers come from a CPU generator seeded by (run seed, global sample index). The noise of a sample is therefore
independent of rank, worker, batch, device and resume.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class Noisy(NamedTuple):
    """A noised row or micro-batch: x_t, what differs from x_0, and the noise level. One *turn* trains on one of these."""

    noisy_ids: Tensor  # [..., L] int64, x_t
    masked: Tensor  # [..., L] bool, positions set to the mask token (M2T)
    corrupted: Tensor  # [..., L] bool, observed positions that hold a wrong token (T2T); disjoint from masked
    t: Tensor  # [..., L] float32, noise level of the position's block
    labels: Tensor  # [..., L] int64, what to predict: x_0, or with insertions and deletions the labels of `edits.py`


def sample_generator(seed: int, index: int, stream: str = "train") -> torch.Generator:
    """CPU generator of a sample, a function of (seed, index, stream). Different streams are independent."""
    digest = hashlib.blake2b(f"{seed}:{index}:{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def block_ids(position_ids: Tensor, block_size: int) -> Tensor:
    """Block of each token within its document: `position_ids // block_size`. [..., L] int64 -> [..., L] int64."""
    return position_ids.div(block_size, rounding_mode="floor")


def block_starts(doc_ids: Tensor, block: Tensor) -> Tensor:
    """Whether each token is the first of its block. doc_ids, block: [..., L] int64 -> [..., L] bool."""
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[..., 1:] = (doc_ids[..., 1:] != doc_ids[..., :-1]) | (block[..., 1:] != block[..., :-1])
    return starts


def noise_levels(doc_ids: Tensor, block: Tensor, t_min: float, t_max: float, generator: torch.Generator) -> Tensor:
    """Noise levels: one t ~ U[t_min, t_max] for each block of each document (LLaDA2.0 eq. 1).

    doc_ids, block: [L] int64 of one row. Returns t [L] float32, constant within a block.
    """
    segment = block_starts(doc_ids, block).cumsum(0) - 1
    draws = torch.rand(int(segment[-1]) + 1, generator=generator)
    return (t_min + (t_max - t_min) * draws)[segment]


def wrong_tokens(input_ids: Tensor, ordinary_ids: Tensor, generator: torch.Generator) -> Tensor:
    """A uniformly random ordinary token other than the clean one, for each position.

    input_ids: [L] int64. ordinary_ids: [n >= 2] int64, sorted, without special tokens. Returns [L] int64.
    """
    n = len(ordinary_ids)
    index = torch.searchsorted(ordinary_ids, input_ids).clamp(max=n - 1)
    is_ordinary = ordinary_ids[index] == input_ids
    # Draw from the list without the clean token: n-1 choices, of which those at or after its index move up by one.
    draws = torch.rand(input_ids.shape, generator=generator, dtype=torch.float64)
    choice = (draws * (n - is_ordinary.long())).long()
    choice += (is_ordinary & (choice >= index)).long()
    return ordinary_ids[choice]


def add_noise(
    input_ids: Tensor,
    loss_mask: Tensor,
    t: Tensor,
    *,
    mask_token_id: int,
    ordinary_ids: Tensor,
    corrupt_rate: float,
    generator: torch.Generator,
) -> Noisy:
    """Mask each allowed token with probability t; replace each remaining allowed token with probability `corrupt_rate`.

    input_ids [L] int64, loss_mask [L] bool (the allowed tokens), t [L] float32 of one row, all on the CPU. A corrupted
    token is neither the clean token nor a special token. Sources: LLaDA2.0 section 3 (M2T), LLaDA2.1 section 3 (T2T).
    """
    masked = (torch.rand(input_ids.shape, generator=generator) < t) & loss_mask
    corrupted = (torch.rand(input_ids.shape, generator=generator) < corrupt_rate) & loss_mask & ~masked
    noisy_ids = torch.where(corrupted, wrong_tokens(input_ids, ordinary_ids, generator), input_ids)
    return Noisy(noisy_ids.masked_fill(masked, mask_token_id), masked, corrupted, t, input_ids)


def complement(input_ids: Tensor, loss_mask: Tensor, noisy: Noisy, mask_token_id: int, t_min: float) -> Noisy:
    """The complementary mask: masked tokens become observed and observed ones masked (LLaDA2.0 section 5.1).

    Each allowed token is masked in exactly one of the two, so the pair supervises every allowed token. No token is
    corrupted. The complement of a mask drawn at level t is a mask drawn at level 1 - t, clipped to `t_min`.
    All tensors [..., L].
    """
    masked = loss_mask & ~noisy.masked
    noisy_ids = input_ids.masked_fill(masked, mask_token_id)
    t = (1.0 - noisy.t).clamp_min(t_min)
    return Noisy(noisy_ids, masked, torch.zeros_like(masked), t, input_ids)


def put_drafts(input_ids: Tensor, noisy: Noisy, drafts: Tensor, uniform: Tensor, share: float, t_min: float) -> Noisy:
    """x_t of the multi-turn forward (LLaDA2.1 section 3): a share of the masked positions holds the model's own draft.

    drafts [..., L] int64: the model's predictions, read at masked positions only. uniform [..., L] float32 in [0, 1): a
    masked position gets its draft where this is below `share`. Right drafts are to be kept, wrong ones to be edited. The
    other masks stay, at noise level t * (1 - share), clipped to `t_min`.
    """
    drafted = noisy.masked & (uniform < share)
    noisy_ids = torch.where(drafted, drafts, noisy.noisy_ids)
    corrupted = noisy.corrupted | (drafted & (drafts != input_ids))
    t = (noisy.t * (1.0 - share)).clamp_min(t_min)
    return Noisy(noisy_ids, noisy.masked & ~drafted, corrupted, t, input_ids)


def left_visible(noisy: Noisy, position_ids: Tensor, block_size: int) -> Tensor:
    """Masked positions whose left context is clean: no masked or corrupted token precedes them in their block.

    position_ids [B, L] int64 -> [B, L] bool. Earlier blocks are read from the clean stream.
    """
    hidden = (noisy.masked | noisy.corrupted).long()
    before = hidden.cumsum(1) - hidden
    index = torch.arange(hidden.shape[1], device=hidden.device)
    block_start = (index - position_ids % block_size).clamp_min(0)  # padding has no blocks
    return noisy.masked & (before == before.gather(1, block_start))
