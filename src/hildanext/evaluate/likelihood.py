"""Likelihood of a continuation given its context: a bound at any block size, exact at block size 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hildanext.diffusion.masks import additive, document_mask
from hildanext.diffusion.objective import predict
from hildanext.evaluate.ar_likelihood import checked
from hildanext.evaluate.elbo import row_bounds, standard_errors
from hildanext.evaluate.noisy_streams import denoise
from hildanext.model.backbone import body
from hildanext.model.diffusion_lm import Batch, DiffusionLM
from hildanext.model.policy import compute_dtype
from hildanext.progress import progress

TOKENS_PER_FORWARD = 1024

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation; neither is empty


class Score(NamedTuple):
    """Log-likelihood of a continuation in nats."""

    log_p: float
    standard_error: float  # of the Monte Carlo estimate; 0 for an exact value
    is_greedy: bool | None  # whether every token is the model's most likely one; None if only a bound is known


def pack_pairs(lm: DiffusionLM, pairs: list[Pair], samples: list[int]) -> tuple[Batch, Tensor]:
    """A batch with one pair per row, padded on the right, and `counted` [B, L] bool: the continuations' tokens."""
    length = max(len(context) + len(target) for context, target in pairs)
    input_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    doc_ids = torch.full_like(input_ids, -1)
    counted = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (context, target) in enumerate(pairs):
        end = len(context) + len(target)
        input_ids[row, :end] = torch.tensor(context + target)
        doc_ids[row, :end] = 0
        counted[row, len(context) : end] = True
    positions = torch.arange(length).expand_as(input_ids).contiguous()
    input_ids, doc_ids, positions, counted = (x.to(lm.device) for x in (input_ids, doc_ids, positions, counted))
    return Batch(samples, input_ids, doc_ids, positions, counted), counted


@torch.no_grad()
def chain(lm: DiffusionLM, pairs: list[Pair], samples: list[int]) -> list[Score]:
    """Exact scores at block size 1: the sum over i of log p(x_i | x_<i, a mask at i), in one forward.

    x_t masks every continuation token. With blocks of one token (LLaDA2.0 eq. 3) each masked token sees only itself and
    the clean tokens before it in x_0. Raises NonFiniteLogitsError.
    """
    batch, counted = pack_pairs(lm, pairs, samples)
    (hidden,) = denoise(lm, batch, [counted], 1)
    labels = batch.input_ids[counted]
    predicted = predict(hidden, lm.decodable_logits, labels)
    ce = checked(predicted.ce.double(), "likelihood, block 1")
    return _sums(ce, predicted.best == labels, counted.nonzero(as_tuple=True)[0], len(pairs))


@torch.no_grad()
def base_chain(lm: DiffusionLM, pairs: list[Pair], samples: list[int]) -> list[Score]:
    """Exact scores of an AR model, or of the base of a gated one: the sum over i of log p(x_i | x_<i), in one forward.

    The mask token, which the base does not have, has probability 0. Raises NonFiniteLogitsError.
    """
    batch, counted = pack_pairs(lm, pairs, samples)
    embeds = lm.embedding(batch.input_ids)
    causal = additive(document_mask(batch.doc_ids).tril(), compute_dtype(embeds))
    hidden = body(lm.model, inputs_embeds=embeds, attention_mask=causal, position_ids=batch.position_ids)
    row, column = counted.nonzero(as_tuple=True)

    def logits(states: Tensor) -> Tensor:
        found: Tensor = lm.head(states).float()
        found[:, lm.mask_token_id] = -torch.inf
        return found

    labels = batch.input_ids[counted]
    predicted = predict(hidden[row, column - 1], logits, labels)
    return _sums(checked(predicted.ce.double(), "likelihood of the base"), predicted.best == labels, row, len(pairs))


def _sums(ce: Tensor, right: Tensor, row: Tensor, n_rows: int) -> list[Score]:
    """Exact scores from the losses [S] of counted tokens, whether each is the likeliest [S], and their rows [S]."""
    ce, right, row = ce.cpu(), right.cpu(), row.cpu()
    nats = torch.zeros(n_rows, dtype=torch.float64).index_add_(0, row, ce)
    wrong = torch.zeros(n_rows, dtype=torch.long).index_add_(0, row, (~right).long())
    return [Score(-n, 0.0, w == 0) for n, w in zip(nats.tolist(), wrong.tolist(), strict=True)]


def bound(
    lm: DiffusionLM, pairs: list[Pair], samples: list[int], block_size: int, draws: int, seed: int
) -> list[Score]:
    """Lower bounds: the ELBO, block by block, with the context clean in x_0, and in x_t inside a shared block.

    Blocks are counted from the context's first token, as in decoding. A score is the mean over `draws` antithetic pairs
    of masks, seeded by (seed, sample, draw), with its standard error (nan for a single pair).
    """
    batch, counted = pack_pairs(lm, pairs, samples)
    found = row_bounds(lm, batch, counted, block_size, draws, seed)
    means, errors = found.mean(1).tolist(), standard_errors(found).tolist()
    return [Score(-n, e, None) for n, e in zip(means, errors, strict=True)]


def _groups(pairs: list[Pair]) -> Iterator[list[int]]:
    """Indices of pairs that share a forward: similar lengths, at most TOKENS_PER_FORWARD tokens including padding."""
    by_length = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    group: list[int] = []
    for i in by_length:
        longest = sum(map(len, pairs[group[0]])) if group else 0
        if group and (len(group) + 1) * longest > TOKENS_PER_FORWARD:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def score(
    lm: DiffusionLM, pairs: list[Pair], title: str, *, block_size: int | None, draws: int, seed: int
) -> list[Score]:
    """Scores in the order of the pairs: exact (`chain`) if block_size is None, else bounds (`bound`).

    `title` labels the progress display.
    """
    found: dict[int, Score] = {}
    lm.model.eval()
    with progress(title, len(pairs), "continuations") as advance:
        for group in _groups(pairs):
            group_pairs = [pairs[i] for i in group]
            scores = (
                chain(lm, group_pairs, group)
                if block_size is None
                else bound(lm, group_pairs, group, block_size, draws, seed)
            )
            found.update(zip(group, scores, strict=True))
            advance(len(found))
    return [found[i] for i in range(len(pairs))]
