"""Exact likelihood of the AR base, on the same rows as the diffusion model's bound (elbo.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hildanext.data.rows import Rows
from hildanext.errors import NonFiniteLogitsError
from hildanext.training.ar_base import next_token_losses


class Likelihood(NamedTuple):
    """Negative log-likelihood of held-out rows in nats, or an upper bound on it, and the number of tokens counted."""

    nats: float
    tokens: int
    standard_error: float  # Monte Carlo error of `nats`; 0 for an exact value


def checked(nats: Tensor, where: str) -> Tensor:
    """Return log-likelihoods or losses unchanged. Raises NonFiniteLogitsError, naming `where`, if one is NaN."""
    if nats.isnan().any():
        raise NonFiniteLogitsError(where)
    return nats


@torch.no_grad()
def ar_likelihood(model: PreTrainedModel, rows: Rows, n_rows: int, batch_rows: int) -> Likelihood:
    """Exact negative log-likelihood of the first `n_rows` rows under the AR model.

    A document's first token is given and not counted. Raises NonFiniteLogitsError.
    """
    nats, tokens = 0.0, 0
    n_rows = min(n_rows, len(rows))
    for start in range(0, n_rows, batch_rows):
        batch = rows.batch(list(range(start, min(start + batch_rows, n_rows))))
        losses = next_token_losses(model, {key: value.to(model.device) for key, value in batch.items()})
        nats += checked(losses, "likelihood of the AR base").double().sum().item()
        tokens += len(losses)
    return Likelihood(nats, tokens, 0.0)
