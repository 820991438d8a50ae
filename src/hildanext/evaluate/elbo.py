"""Held-out likelihood bound of a block-diffusion model, block by block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hildanext.ar import Likelihood
from hildanext.model import DiffusionLM
from hildanext.noise import block_ids, sample_generator
from hildanext.passes import make_batch
from hildanext.rows import Rows


def mask_exactly(doc_ids: Tensor, block: Tensor, allowed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw m ~ U{1..n} for each block with n allowed tokens and mask m of them: (masked [L] bool, weight [L] = n/m).

    E[n/m * sum_masked CE] = sum_m E[CE | m masked]: the block's negative ELBO with the integral over t done in closed
    form (Ou et al. 2025, arXiv 2406.03736, eq. 3.4), and so without the variance of 1/t. With n = 1 it is exact.
    """
    new = torch.ones_like(doc_ids, dtype=torch.bool)
    new[1:] = (doc_ids[1:] != doc_ids[:-1]) | (block[1:] != block[:-1])
    segment = new.cumsum(0) - 1
    n_segments = int(segment[-1]) + 1
    n = torch.zeros(n_segments, dtype=torch.long).index_add_(0, segment, allowed.long())
    m = 1 + (torch.rand(n_segments, generator=generator) * n).long().clamp(max=(n - 1).clamp_min(0))
    # Rank the allowed tokens of a segment in random order; the first m are masked.
    keys = torch.rand(len(doc_ids), generator=generator).masked_fill(~allowed, 2.0)
    by_key = keys.argsort()
    order = by_key[segment[by_key].argsort(stable=True)]
    start = torch.zeros(n_segments, dtype=torch.long)
    start[1:] = torch.bincount(segment, minlength=n_segments).cumsum(0)[:-1]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - start[segment[order]]
    masked = allowed & (rank < m[segment])
    return masked, (n / m)[segment]


@torch.no_grad()
def elbo(
    lm: DiffusionLM, rows: Rows, block_size: int, n_rows: int, batch_rows: int, samples: int = 4, seed: int = 0
) -> Likelihood:
    """Upper bound on the negative log-likelihood of the first `n_rows` rows, blocks of `block_size` in order.

    `samples` independent draws give the mean and its Monte Carlo standard error (nan for one draw). Documents' first tokens are given and
    do not count, under either convention, as in `ar_likelihood`.
    """
    totals = torch.zeros(samples, dtype=torch.float64)
    tokens = 0
    n_rows = min(n_rows, len(rows))
    lm.model.eval()
    for start in range(0, n_rows, batch_rows):
        indices = list(range(start, min(start + batch_rows, n_rows)))
        batch = make_batch(lm, indices, rows.batch(indices))
        counted = batch.allowed & (batch.position_ids > 0)
        tokens += int(counted.sum())
        docs, blocks = batch.doc_ids.cpu(), block_ids(batch.position_ids, block_size).cpu()
        allowed = counted.cpu()
        for k in range(samples):
            drawn = [
                mask_exactly(docs[i], blocks[i], allowed[i], sample_generator(seed, index * samples + k, "elbo"))
                for i, index in enumerate(indices)
            ]
            masked, weight = (torch.stack(part).to(lm.device) for part in zip(*drawn, strict=True))
            noisy_ids = batch.input_ids.masked_fill(masked, lm.mask_token_id)
            logits = lm(noisy_ids, batch.input_ids, batch.doc_ids, batch.position_ids, masked, block_size).float()
            logits[:, lm.mask_token_id] = -torch.inf  # decoding predicts neither it
            logits[:, lm.vocab_size :] = -torch.inf  # nor the padding rows of the vocabulary
            ce = F.cross_entropy(logits, batch.input_ids[masked], reduction="none")
            totals[k] += (ce * weight[masked]).double().sum().item()
    spread = totals.std().item() / samples**0.5 if samples > 1 else math.nan
    return Likelihood(totals.mean().item(), tokens, spread)
