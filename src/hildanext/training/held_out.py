"""Held-out evaluation during training: loss and accuracy on masked tokens at fixed mask rates and fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from hildanext.data.rows import Rows
from hildanext.diffusion.noise import Noisy, add_noise, sample_generator
from hildanext.diffusion.objective import Predicted, predict
from hildanext.model.diffusion_lm import Batch, DiffusionLM, make_batch

RATES = tuple(i / 10 for i in range(1, 11))  # share of masked tokens
EVAL_SEED = 20260


class Denoising(NamedTuple):
    """Result of an evaluation over all masked tokens."""

    loss: float  # mean cross-entropy in nats
    accuracy: float
    n_masked: int
    by_rate: dict[float, tuple[float, float]]  # mask rate -> (loss, accuracy)


# (clean rows, x_t) -> predictions at the masked positions.
Predict = Callable[[Batch, Noisy], Predicted]


def predict_masked(lm: DiffusionLM, batch: Batch, noisy: Noisy, block_size: int) -> Predicted:
    """Predictions of `lm` at the masked positions of a noised micro-batch."""
    hidden = lm(batch, noisy.noisy_ids, noisy.masked, block_size)
    return predict(hidden, lm.head, batch.input_ids[noisy.masked], lm.mask_token_id)


@torch.no_grad()
def evaluate_denoising(
    lm: DiffusionLM,
    rows: Rows,
    block_size: int,
    n_rows: int,
    batch_rows: int,
    *,
    every_rate: bool = False,
    model: Predict | None = None,
) -> Denoising:
    """Mask the first `n_rows` rows at rates 0.1 to 1.0 and predict them. The noise is fixed, so models are comparable.

    every_rate: False masks row i at RATES[i % 10] (one forward per row, for use during training), True masks each row
    at all ten rates. model: replaces `predict_masked` if `lm` is wrapped, since sharded parameters are complete only
    inside the wrapper's forward.
    """
    was_training = lm.model.training
    lm.model.eval()
    n_rows = min(n_rows, len(rows))
    work = [(i, r) for r in range(10) for i in range(n_rows)] if every_rate else [(i, i % 10) for i in range(n_rows)]
    sums = torch.zeros(10, 3, dtype=torch.float64)
    for start in range(0, len(work), batch_rows):
        items = work[start : start + batch_rows]
        indices = [i for i, _ in items]
        batch = make_batch(lm, indices, rows.batch(indices))
        noised = []
        for (index, rate), ids, allowed in zip(items, batch.input_ids.cpu(), batch.allowed.cpu(), strict=True):
            noised.append(
                add_noise(
                    ids,
                    allowed,
                    torch.full(ids.shape, RATES[rate]),
                    mask_token_id=lm.mask_token_id,
                    ordinary_ids=lm.ordinary_ids,
                    corrupt_rate=0.0,
                    generator=sample_generator(EVAL_SEED, index * 10 + rate, "eval"),
                )
            )
        noisy = Noisy(*(torch.stack(field).to(lm.device) for field in zip(*noised, strict=True)))
        predicted = model(batch, noisy) if model else predict_masked(lm, batch, noisy, block_size)
        labels = batch.input_ids[noisy.masked]
        ce, correct = predicted.ce.double().cpu(), (predicted.best == labels).double().cpu()
        rate_index = torch.tensor([r for _, r in items])[:, None].expand(noisy.masked.shape)[noisy.masked.cpu()]
        sums.index_add_(0, rate_index, torch.stack([ce, correct, torch.ones_like(ce)], dim=1))
    lm.model.train(was_training)
    loss, accuracy, n_masked = sums.sum(0).tolist()
    by_rate = {RATES[i]: (row[0] / row[2], row[1] / row[2]) for i, row in enumerate(sums.tolist()) if row[2] > 0}
    return Denoising(loss / max(n_masked, 1), accuracy / max(n_masked, 1), int(n_masked), by_rate)
