"""Likelihood bounds of a block-diffusion model, block by block, by seeded Monte Carlo over masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hildanext.data.rows import Rows
from hildanext.diffusion.noise import block_ids, block_starts, sample_generator
from hildanext.diffusion.objective import predict
from hildanext.evaluate.ar_likelihood import Likelihood
from hildanext.evaluate.noisy_streams import denoise
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch


def mask_pair(
    doc_ids: Tensor, block: Tensor, allowed: Tensor, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An antithetic pair of draws of one row, each (masked [L] bool, weight [L] float32 = n/m).

    A draw takes m ~ U{1..n} for each block with n allowed tokens and masks m of them. E[n/m * sum_masked CE] =
    sum_m E[CE | m masked]: the block's negative ELBO with the integral over t done in closed form (Ou et al. 2025, arXiv
    2406.03736, eq. 3.4), and so without the variance of 1/t. With n = 1 it is exact.

    The second draw turns the random numbers of the first around (u -> 1-u; Hammersley and Morton 1956): n+1-m tokens, the
    last ones of the random order. It is distributed as the first, looks at the tokens that the first left out, and a block
    that is nearly clean in the one is nearly all masks in the other; so their mean varies less than that of two free draws.
    """
    new = block_starts(doc_ids, block)
    segment = new.cumsum(0) - 1
    n_segments = int(segment[-1]) + 1
    n = torch.zeros(n_segments, dtype=torch.long).index_add_(0, segment, allowed.long())
    # Two numbers a position, so that padding behind a document changes none of its own; a segment takes its first's.
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
    """[B, pairs] float64: for each row and pair of draws, an unbiased estimate of a bound on -log p (nats) of its counted
    tokens, given the others.

    counted [B, L] bool, all of them predictable (not a document's first token under `shifted`). Draws are seeded by
    (seed, sample of the row, pair), so they do not depend on the batch.
    """
    docs, blocks = batch.doc_ids.cpu(), block_ids(batch.position_ids, block_size).cpu()
    allowed = counted.cpu()
    draws: list[tuple[Tensor, Tensor]] = []  # masked and weight [B, L], the two halves of a pair one after the other
    for k in range(pairs):
        drawn = [
            mask_pair(docs[i], blocks[i], allowed[i], sample_generator(seed, sample * pairs + k, "elbo"))
            for i, sample in enumerate(batch.samples)
        ]
        for half in (0, 1):
            masked, weight = (torch.stack(part).to(lm.device) for part in zip(*(p[half] for p in drawn), strict=True))
            draws.append((masked, weight))
    found = torch.zeros(len(batch.samples), pairs, dtype=torch.float64)
    every = denoise(lm, batch, [masked for masked, _ in draws], block_size)
    for number, ((masked, weight), hidden) in enumerate(zip(draws, every, strict=True)):
        ce = predict(hidden, lm.decodable_logits, batch.input_ids[masked]).ce
        row = masked.nonzero(as_tuple=True)[0].cpu()
        found[:, number // 2].index_add_(0, row, (ce * weight[masked]).double().cpu() / 2)
    return found


def standard_errors(estimates: Tensor) -> Tensor:
    """Monte Carlo standard error [B] of each row's mean over its estimates [B, n]; nan for n = 1."""
    n = estimates.shape[1]
    return (estimates.var(1) / n).sqrt() if n > 1 else torch.full(estimates.shape[:1], math.nan)


def elbo(
    lm: DiffusionLM, rows: Rows, block_size: int, n_rows: int, batch_rows: int, pairs: int = 2, seed: int = 0
) -> Likelihood:
    """Upper bound on the negative log-likelihood of the first `n_rows` rows, blocks of `block_size` in order.

    The mean over `pairs` pairs of draws a row and its Monte Carlo standard error, from the spread of each
    row's pairs (nan for one pair). Documents' first tokens are given and do not count, under either convention, as in
    `ar_likelihood`.
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
