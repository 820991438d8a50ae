"""What the AR base says of a text, and how much a text repeats itself."""

from __future__ import annotations

import itertools
import math

import torch
from transformers import PreTrainedModel

from hildanext.errors import DataError
from hildanext.model.backbone import n_embeddings


@torch.no_grad()
def parent_log_likelihood(model: PreTrainedModel, prompt_ids: list[int], new_ids: list[int]) -> float:
    """Mean log-probability in nats that the AR base gives each token of a continuation; nan for an empty one."""
    if not new_ids:
        return math.nan
    limit = n_embeddings(model)  # the base has no row for the mask token, which never appears
    ids = torch.tensor([prompt_ids + new_ids], device=model.device)
    if int(ids.max()) >= limit:
        raise DataError(
            "the continuation has token ids that the base does not know; give the checkpoint's own base with --base"
        )
    log_p = model(ids).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
    return log_p.gather(1, ids[0, len(prompt_ids) :, None]).mean().item()


def distinct_2(texts: list[list[int]]) -> float:
    """Share of different bigrams among all bigrams of the texts (as token ids)."""
    bigrams = [pair for ids in texts for pair in itertools.pairwise(ids)]
    return len(set(bigrams)) / max(len(bigrams), 1)
