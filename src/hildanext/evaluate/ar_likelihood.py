"""The exact likelihood of the AR base, on the rows that the diffusion model is measured on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import (
    PreTrainedModel,
)

from hildanext.data.rows import Rows
from hildanext.training.ar_base import next_token_losses


class Likelihood(NamedTuple):
    """Negative log-likelihood (or its bound) of held-out rows, in nats."""

    nats: float
    tokens: int
    standard_error: float  # of `nats`; 0 where the figure is exact


@torch.no_grad()
def ar_likelihood(model: PreTrainedModel, rows: Rows, n_rows: int, batch_rows: int) -> Likelihood:
    """Exact negative log-likelihood of the first `n_rows` rows under the AR model."""
    nats, tokens = 0.0, 0
    n_rows = min(n_rows, len(rows))
    for start in range(0, n_rows, batch_rows):
        batch = rows.batch(list(range(start, min(start + batch_rows, n_rows))))
        losses = next_token_losses(model, {key: value.to(model.device) for key, value in batch.items()})
        nats += losses.double().sum().item()
        tokens += len(losses)
    return Likelihood(nats, tokens, 0.0)
