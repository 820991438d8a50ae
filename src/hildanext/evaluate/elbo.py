"""Likelihood bound of a block-diffusion model: the ELBO of each block, estimated by seeded Monte Carlo over masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hildanext.data.rows import Rows
from hildanext.diffusion.noise import block_ids, block_starts, sample_generator
from hildanext.diffusion.objective import predict
from hildanext.evaluate.ar_likelihood import Likelihood, checked
from hildanext.evaluate.noisy_streams import denoise
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch


def mask_pair(
    doc_ids: Tensor, block: Tensor, allowed: Tensor, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An antithetic pair of draws for one row, each (masked [L] bool, weight [L] float32 = n/m).

    doc_ids, block [L] int64 and allowed [L] bool describe the row. For a block with n allowed tokens, a draw masks m of
    them with m ~ U{1..n}. E[n/m * sum_masked CE] = sum_m E[CE | m masked] is the block's negative ELBO. The integral
    over t is done in closed form (Ou et al. 2025, arXiv 2406.03736, eq. 3.4), which removes the variance of 1/t. With
    n = 1 the estimate is exact.

    The second draw uses the reversed random numbers, u -> 1-u (Hammersley and Morton 1956): it masks the last n+1-m
    tokens of the same random order. Both draws have the same distribution, and the second covers the tokens that the
    first left out. If one is nearly clean the other is nearly all masks, so their mean varies less than the mean of two
    independent draws.
    """
    new = block_starts(doc_ids, block)
    segment = new.cumsum(0) - 1
    n_segments = int(segment[-1]) + 1
    n = torch.zeros(n_segments, dtype=torch.long).index_add_(0, segment, allowed.long())
    # Two numbers per position, so padding does not change a document's draws. A segment uses its first position's.
    draws = torch.rand(len(doc_ids), 2, generator=generator)
    m = 1 + (draws[new, 0] * n).long().clamp(max=(n - 1).clamp_min(0))
    # Rank the allowed tokens of a segment in random order; the first m are masked.
    by_key = draws[:, 1].masked_fill(~allowed, 2.0).argsort()
    order = by_key[segment[by_key].argsort(stable=True)]
    start = torch.zeros(n_segments, dtype=torch.long)
    start[1:] = torch.bincount(segment, minlength=n_segments).cumsum(0)[:-1]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - start[segment[order]]
    m, n = m[segment], n[segment]
    return (allowed & (rank < m), n / m), (allowed & (rank >= m - 1), n / (n + 1 - m).clamp_min(1))


@torch.no_grad()
def row_bounds(lm: DiffusionLM, batch: Batch, counted: Tensor, block_size: int, pairs: int, seed: int) -> Tensor:
    """Unbiased estimates [B, pairs] float64 of an upper bound on -log p, in nats, of each row's counted tokens.

    counted [B, L] bool: every counted token must be predictable (not a document's first token under `shifted`); the
    others are given. Draws are seeded by (seed, the row's sample number, pair) and do not depend on the batch. Raises
    NonFiniteLogitsError.
    """
    docs, blocks = batch.doc_ids.cpu(), block_ids(batch.position_ids, block_size).cpu()
    allowed = counted.cpu()
    draws: list[tuple[Tensor, Tensor]] = []  # masked and weight [B, L]; the two draws of a pair are adjacent
    for k in range(pairs):
        drawn = [
            mask_pair(docs[i], blocks[i], allowed[i], sample_generator(seed, sample * pairs + k, "elbo"))
            for i, sample in enumerate(batch.samples)
        ]
        for half in (0, 1):
            masked, weight = (torch.stack(part).to(lm.device) for part in zip(*(p[half] for p in drawn), strict=True))
            draws.append((masked, weight))
    found = torch.zeros(len(batch.samples), pairs, dtype=torch.float64)
    hidden_states = denoise(lm, batch, [masked for masked, _ in draws], block_size)
    for number, ((masked, weight), hidden) in enumerate(zip(draws, hidden_states, strict=True)):
        ce = predict(hidden, lm.decodable_logits, batch.input_ids[masked]).ce
        row = masked.nonzero(as_tuple=True)[0].cpu()
        found[:, number // 2].index_add_(0, row, (ce * weight[masked]).double().cpu() / 2)
    return checked(found, f"likelihood bound, block {block_size}")


def standard_errors(estimates: Tensor) -> Tensor:
    """Monte Carlo standard error [B] of each row's mean over its estimates [B, n]; nan if n = 1."""
    n = estimates.shape[1]
    return (estimates.var(1) / n).sqrt() if n > 1 else torch.full(estimates.shape[:1], math.nan)


def elbo(
    lm: DiffusionLM, rows: Rows, block_size: int, n_rows: int, batch_rows: int, pairs: int = 2, seed: int = 0
) -> Likelihood:
    """Upper bound on the negative log-likelihood of the first `n_rows` rows, decoded in blocks of `block_size`.

    The mean over `pairs` antithetic pairs of draws per row. Its Monte Carlo standard error comes from the spread of
    each row's pairs (nan for a single pair). A document's first token is given and not counted under either convention,
    as in `ar_likelihood`.
    """
    n_rows = min(n_rows, len(rows))
    lm.model.eval()
    tokens, found = 0, []
    for start in range(0, n_rows, batch_rows):
        indices = list(range(start, min(start + batch_rows, n_rows)))
        batch = make_batch(lm, indices, rows.batch(indices))
        counted = batch.allowed & (batch.position_ids > 0)
        tokens += int(counted.sum())
        found.append(row_bounds(lm, batch, counted, block_size, pairs, seed))
    estimates = torch.cat(found)
    error = standard_errors(estimates).square().sum().sqrt().item()
    return Likelihood(estimates.mean(1).sum().item(), tokens, error)
