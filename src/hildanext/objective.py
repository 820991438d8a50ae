"""The denoising loss: M2T (fill masks) plus T2T (repair wrong tokens, keep right ones). fp32 sums over a global count.

Source: LLaDA2.0 eq. 1-2 (ELBO weight 1/t of the linear schedule), LLaDA2.1 section 3 (T2T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """fp32 scalars, already divided by the number of allowed tokens. total = w_m2t * m2t + w_t2t * t2t + CAP."""

    total: Tensor
    m2t: Tensor
    t2t: Tensor


class Counts(NamedTuple):
    """What the logs need, as sums over positions (float32 scalars without gradient)."""

    masked: Tensor
    masked_ce: Tensor  # unweighted cross-entropy in nats
    masked_correct: Tensor
    corrupted: Tensor
    corrupted_correct: Tensor


def denoising_loss(
    logits: Tensor,
    labels: Tensor,
    t: Tensor,
    is_masked: Tensor,
    is_wrong: Tensor,
    n_tokens: int,
    *,
    weighting: str = "elbo",
    w_m2t: float = 1.0,
    w_t2t: float = 1.0,
    keep: float = 1.0,
    cap_weight: float = 0.0,
) -> tuple[Loss, Counts]:
    """Loss over the supervised positions only (S of them, over the whole micro-batch).

    logits [S, V] any float dtype, labels [S] int64 (always x_0), t [S] float32, is_masked [S] bool, is_wrong [S] bool
    (observed, and not the clean token). The other positions are observed and right: "keep" positions, weighted `keep`
    inside T2T. n_tokens: allowed tokens of the whole effective batch, over all processes.

        total = w_m2t * sum_masked(w(t) CE) / N + w_t2t * (sum_wrong CE + keep * sum_right CE) / N,  w(t) = 1/t or 1

    cap_weight adds the confidence loss of LLaDA2.0 section 5.2: the entropy of correctly predicted masked tokens.
    """
    logits = logits.float()
    ce = F.cross_entropy(logits, labels, reduction="none")
    masked, wrong = is_masked.float(), is_wrong.float()
    right = 1.0 - masked - wrong
    weight = 1.0 / t if weighting == "elbo" else torch.ones_like(t)
    m2t = (ce * weight * masked).sum() / n_tokens
    t2t = (ce * (wrong + keep * right)).sum() / n_tokens
    total = w_m2t * m2t + w_t2t * t2t
    correct = (logits.detach().argmax(-1) == labels).float()
    if cap_weight > 0:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        total = total + cap_weight * (entropy * correct * masked).sum() / n_tokens
    with torch.no_grad():
        counts = Counts(
            masked.sum(), (ce * masked).sum(), (correct * masked).sum(), wrong.sum(), (correct * wrong).sum()
        )
    return Loss(total, m2t, t2t), counts
