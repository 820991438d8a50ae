"""Two judgements of a text: its likelihood under the AR base, and how much it repeats itself."""

from __future__ import annotations

import itertools
import math

import torch
from transformers import PreTrainedModel

from hildanext.errors import DataError
from hildanext.evaluate.ar_likelihood import checked
from hildanext.model.backbone import n_embeddings


@torch.no_grad()
def mean_log_likelihood(base: PreTrainedModel, prompt_ids: list[int], new_ids: list[int]) -> float:
    """Mean log-probability, in nats per token, of a continuation under the AR base; nan for an empty continuation.

    Raises DataError for token ids outside the base's vocabulary, NonFiniteLogitsError.
    """
    if not new_ids:
        return math.nan
    ids = torch.tensor([prompt_ids + new_ids], device=base.device)
    if int(ids.max()) >= n_embeddings(base):  # the base lacks the mask token, but finished text never contains it
        raise DataError(
            "the continuation has token ids that the base does not know; give the checkpoint's own base with --base"
        )
    log_p = base(ids).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
    return checked(log_p.gather(1, ids[0, len(prompt_ids) :, None]), "likelihood under the AR base").mean().item()


def total_log_likelihood(base: PreTrainedModel, prompt_ids: list[int], new_ids: list[int]) -> float:
    """Log-probability of a whole continuation under the AR base, in nats; 0 for an empty continuation."""
    return mean_log_likelihood(base, prompt_ids, new_ids) * len(new_ids) if new_ids else 0.0


def distinct_2(texts: list[list[int]]) -> float:
    """Share of distinct bigrams among all bigrams of the texts (given as token ids)."""
    bigrams = [pair for ids in texts for pair in itertools.pairwise(ids)]
    return len(set(bigrams)) / max(len(bigrams), 1)
