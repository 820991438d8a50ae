"""The noised forwards of one training sample: turn 0, its complement, and the multi-turn forward on the model's drafts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.config import NoiseConfig
from hildanext.diffusion.noise import Noisy, add_noise, block_ids, complement, noise_levels, sample_generator
from hildanext.model.diffusion_lm import Batch, DiffusionLM


class Recipe(NamedTuple):
    """What `convert-wsd` and `sft` do differently in a step."""

    turns: int
    complementary: bool
    t_min: float
    t_max: float
    cap_weight: float


class Pass(NamedTuple):
    """One forward of a micro-batch. All [B, L], on the model's device."""

    noisy_ids: Tensor  # int64
    masked: Tensor  # bool
    wrong: Tensor  # bool, observed and not the clean token
    t: Tensor  # float32


class Piece(NamedTuple):
    """What came of one pass of a micro-batch."""

    loss: Tensor  # fp32 scalar, already divided by the count over the whole effective batch
    sums: dict[str, Tensor]  # for the log: added up over passes, micro-batches and processes
    name: str  # for an error


def first_passes(
    lm: DiffusionLM, batch: Batch, block_size: int, recipe: Recipe, noise: NoiseConfig, seed: int
) -> list[Pass]:
    """Turn 0 of each row, noised from its own generator, and the complementary pass when asked for."""
    cpu = [tensor.cpu() for tensor in (batch.input_ids, batch.doc_ids, batch.position_ids, batch.allowed)]
    straight, inverse = [], []
    for sample, input_ids, doc_ids, position_ids, allowed in zip(batch.samples, *cpu, strict=True):
        generator = sample_generator(seed, sample)
        t = noise_levels(doc_ids, block_ids(position_ids, block_size), recipe.t_min, recipe.t_max, generator)
        noisy = add_noise(
            input_ids,
            allowed,
            t,
            mask_token_id=lm.mask_token_id,
            ordinary_ids=lm.ordinary_ids,
            corrupt_rate=noise.corrupt_rate,
            generator=generator,
        )
        straight.append((noisy, t))
        if recipe.complementary:
            # The inverse of a mask drawn at level t is one drawn at 1 - t.
            other = complement(input_ids, allowed, noisy, lm.mask_token_id)
            inverse.append((other, (1.0 - t).clamp_min(recipe.t_min)))
    return [_stack(rows, lm.device) for rows in (straight, inverse) if rows]


def _stack(rows: list[tuple[Noisy, Tensor]], device: torch.device) -> Pass:
    noisy_ids, masked, corrupted = (
        torch.stack(part).to(device) for part in zip(*(row for row, _ in rows), strict=True)
    )
    return Pass(noisy_ids, masked, corrupted, torch.stack([t for _, t in rows]).to(device))


def left_visible(one: Pass, position_ids: Tensor, block_size: int) -> Tensor:
    """Masked positions that see all of their document to the left as it is: nothing masked or wrong before them in their block.

    [B, L] bool. Blocks before are seen clean.
    """
    hidden = (one.masked | one.wrong).long()
    before = hidden.cumsum(1) - hidden
    places = torch.arange(hidden.shape[1], device=hidden.device)
    opens = (places - position_ids % block_size).clamp_min(0)  # first place of one's block; padding has no blocks
    return one.masked & (before == before.gather(1, opens))


def drafted_pass(batch: Batch, first: Pass, predicted: Tensor, share: float, seed: int, t_min: float) -> Pass:
    """Multi-turn forward (LLaDA2.1 section 3): some masked positions now hold the model's own draft.

    predicted [B, L] int64: the model's prediction at turn 0's masked positions. A share of those becomes observed; right
    drafts are to be kept, wrong ones edited. The rest stays masked, at noise level t * (1 - share); as everywhere, no 1/t is above 1/t_min.
    """
    draws = torch.stack(
        [torch.rand(first.t.shape[1], generator=sample_generator(seed, s, "draft")) for s in batch.samples]
    )
    drafted = first.masked & (draws.to(first.t.device) < share)
    noisy_ids = torch.where(drafted, predicted, first.noisy_ids)
    wrong = first.wrong | (drafted & (predicted != batch.input_ids))
    return Pass(noisy_ids, first.masked & ~drafted, wrong, (first.t * (1.0 - share)).clamp_min(t_min))
