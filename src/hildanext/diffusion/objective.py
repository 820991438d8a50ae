"""The denoising loss: M2T (predict masked tokens) plus T2T (repair wrong tokens, keep right ones).

Sources: LLaDA2.0 (arXiv 2512.15745) eq. 1-2 for the ELBO weight 1/t of the linear schedule and section 5.2 for CAP;
LLaDA2.1 (arXiv 2602.08676) section 3 for T2T.
The head runs on a chunk of supervised positions at a time, forward and backward together: full [S, V] logits never exist.
Sums are fp32 and divided by a count over the whole effective batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 1 << 24  # elements in a chunk of logits: 64 MB in fp32 for any vocabulary


class Loss(NamedTuple):
    """fp32 scalars, already divided by the number of allowed tokens. total = w_m2t * m2t + w_t2t * t2t + CAP."""

    total: Tensor
    m2t: Tensor
    t2t: Tensor


class Counts(NamedTuple):
    """Sums over positions for the log: float32 scalars without gradient."""

    masked: Tensor
    masked_ce: Tensor  # unweighted cross-entropy in nats
    masked_correct: Tensor
    corrupted: Tensor
    corrupted_correct: Tensor


class Target(NamedTuple):
    """The S supervised positions of a noised micro-batch. A position neither masked nor corrupted is observed and right."""

    labels: Tensor  # [S] int64, `Noisy.labels`
    t: Tensor  # [S] float32, noise level
    masked: Tensor  # [S] bool
    corrupted: Tensor  # [S] bool, observed and not the label


class Weights(NamedTuple):
    """How much each kind of supervised position counts."""

    weighting: Literal["elbo", "uniform"] = "elbo"  # of a masked token: 1/t or 1
    w_m2t: float = 1.0
    w_t2t: float = 1.0
    keep: float = 1.0  # of observed right tokens, within T2T
    cap_weight: float = 0.0


class Soft(NamedTuple):
    """A teacher's distribution that replaces a share of the one-hot target; its logits are made a few positions at a time."""

    hidden: Tensor  # [S, H'] the teacher's hidden states
    logits: Callable[[Tensor], Tensor]  # [n, H'] -> [n, V] float32; -inf for ids that are never predicted
    share: Tensor  # [S] float32 in [0, 1]; 0 keeps the one-hot target


class Predicted(NamedTuple):
    """Predictions at S positions, without gradient."""

    ce: Tensor  # [S] float32, nats
    best: Tensor  # [S] int64, the most likely id other than the mask token


def denoising_loss(
    hidden: Tensor,
    head: nn.Module,
    target: Target,
    n_tokens: int,
    weights: Weights,
    *,
    mask_token_id: int | None = None,
    soft: Soft | None = None,
) -> tuple[Loss, Counts, Predicted]:
    """The loss over S supervised positions of a micro-batch, counts for the log, and the predictions.

    hidden [S, H] any float dtype; head: [n, H] -> logits [n, V]; n_tokens N: allowed tokens of the whole effective batch,
    over all processes and turns.

        total = w_m2t * sum_masked(w(t) CE) / N + w_t2t * (sum_corrupted CE + keep * sum_right CE) / N,  w(t) = 1/t or 1

    mask_token_id: never counted as the best id, since decoding cannot predict it.
    weights.cap_weight adds the confidence loss of LLaDA2.0 section 5.2: the entropy of correctly predicted masked tokens.
    soft: in `total`, CE becomes (1 - share) CE + share KL(q || p) with the teacher's q (Hinton et al. 2015, arXiv
    1503.02531, temperature 1); the other numbers keep the label's CE.
    """
    masked, corrupted = target.masked.float(), target.corrupted.float()
    m2t_weight = masked / target.t if weights.weighting == "elbo" else masked
    t2t_weight = corrupted + weights.keep * (1.0 - masked - corrupted)
    # The sum has weights of about 1 and is divided by N at the end: fp16 gradients of 1/N would vanish.
    summed, ce, best = _HeadLoss.apply(
        hidden,
        head,
        target.labels,
        weights.w_m2t * m2t_weight + weights.w_t2t * t2t_weight,
        weights.cap_weight * masked if weights.cap_weight else None,
        mask_token_id,
        soft,
        *trainable(head),
    )
    with torch.no_grad():
        correct = (best == target.labels).float()
        m2t, t2t = (ce * m2t_weight).sum() / n_tokens, (ce * t2t_weight).sum() / n_tokens
        counts = Counts(
            masked.sum(), (ce * masked).sum(), (correct * masked).sum(), corrupted.sum(), (correct * corrupted).sum()
        )
    return Loss(summed / n_tokens, m2t, t2t), counts, Predicted(ce, best)


def weighted_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * CE) over S positions, fp32 scalar. weight [S] float32 may be negative. The head runs chunk by chunk."""
    summed, _, _ = _HeadLoss.apply(hidden, head, labels, weight, None, None, None, *trainable(head))
    return summed


def trainable(head: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


@torch.no_grad()
def predict(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, mask_token_id: int | None = None
) -> Predicted:
    """Cross-entropy of `labels` [S] and the best id at hidden states [S, H], chunk by chunk."""
    parts = [
        _predict(head(h).to(torch.float32, copy=True), y, mask_token_id)[0] for h, y in _chunks(hidden, head, labels)
    ]
    return Predicted(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _chunks(hidden: Tensor, head: Callable[[Tensor], Tensor], *others: Tensor) -> zip[tuple[Tensor, ...]]:
    """Cut tensors of S positions so that a chunk's logits stay below LOGITS_AT_ONCE; S = 0 gives one empty chunk."""
    vocabulary = head(hidden[:1].detach()).shape[-1] if len(hidden) else 1
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return zip(*(tensor.split(size) for tensor in (hidden, *others)), strict=True)


def _predict(logits: Tensor, labels: Tensor, mask_token_id: int | None) -> tuple[Predicted, Tensor]:
    """Predictions from float32 logits [n, V], and the sum [n, 1] of their exponentials. Overwrites the logits by these."""
    if mask_token_id is None:
        best = logits.argmax(-1)
        top = logits.gather(-1, best[:, None])
    else:
        at_mask = logits[:, mask_token_id, None].clone()
        logits[:, mask_token_id] = -torch.inf
        best = logits.argmax(-1)
        top = torch.maximum(logits.gather(-1, best[:, None]), at_mask)
        logits[:, mask_token_id, None] = at_mask
    logits.sub_(top)
    at_label = logits.gather(-1, labels[:, None])
    z = logits.exp_().sum(-1, keepdim=True)
    return Predicted((z.log() - at_label)[:, 0], best), z


def _cast(head: nn.Module, device_type: str) -> dict[str, Tensor]:
    """The head's weights in autocast's type: cast once, not for every chunk. They are leaves with gradients of that type."""
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return {
        name: parameter.detach().to(dtype or parameter.dtype).requires_grad_(parameter.requires_grad)
        for name, parameter in head.named_parameters()
        if parameter.is_floating_point()  # quantized weights are integers
    }


class _HeadLoss(torch.autograd.Function):
    """sum(weight * CE or its mix with KL) + sum over right positions of (cap * entropy); gradients chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Module,
        labels: Tensor,
        weight: Tensor,
        cap: Tensor | None,
        mask_token_id: int | None,
        soft: Soft | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        weights = _cast(head, hidden.device.type)
        leaves = [tensor for tensor in weights.values() if tensor.requires_grad]
        at_hidden = torch.zeros_like(hidden) if wanted else hidden
        at_parameters: list[Tensor] = []
        total, start = torch.zeros((), device=hidden.device), 0
        found: list[Predicted] = []

        def run(h: Tensor) -> Tensor:
            return torch.func.functional_call(head, weights, h)

        for h, y, w, c in _chunks(hidden, run, labels, weight, weight if cap is None else cap):
            with torch.enable_grad() if wanted else torch.no_grad():
                leaf = h.detach().requires_grad_(wanted)
                logits = run(leaf)
            chunk = None if soft is None else Soft(*(_cut(part, start, len(h)) for part in soft))
            value, predicted, slope = _slope(logits.detach(), y, w, None if cap is None else c, mask_token_id, chunk)
            total += value
            found.append(predicted)
            if wanted:
                slope = slope.to(logits.dtype)
                at_hidden[start : start + len(h)], *more = torch.autograd.grad(logits, [leaf, *leaves], slope)
                if at_parameters:
                    for grad, addend in zip(at_parameters, more, strict=True):
                        grad += addend
                else:
                    at_parameters = [grad.to(p.dtype) for grad, p in zip(more, parameters, strict=True)]
            start += len(h)
        ctx.grads = [at_hidden, *at_parameters]
        joined = Predicted(*(torch.cat(part) for part in zip(*found, strict=True)))
        ctx.mark_non_differentiable(*joined)
        return total, *joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, []
        at_hidden, *at_parameters = (grad.mul_(upstream) for grad in grads)
        return at_hidden, None, None, None, None, None, None, *at_parameters


def _cut(part: Any, start: int, n: int) -> Any:
    return part[start : start + n] if isinstance(part, Tensor) else part


def _slope(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    cap: Tensor | None,
    mask_token_id: int | None,
    soft: Soft | None = None,
) -> tuple[Tensor, Predicted, Tensor]:
    """A chunk's loss, its predictions, and the gradient of the loss at its logits [n, V], float32.

    With p = softmax(logits), the gradient of the cross-entropy is p - onehot, of KL(q || p) p - q, and of the entropy
    -p (log p + H).
    """
    p = logits.to(torch.float32, copy=True)
    taught = None if soft is None else _teach(p, labels, soft)
    predicted, z = _predict(p, labels, mask_token_id)
    value = (weight * predicted.ce).sum()
    if cap is None:
        slope = p.mul_(weight[:, None] / z)
    else:
        cap = (cap * (predicted.best == labels))[:, None]
        p /= z
        p_log_p = torch.xlogy(p, p)
        entropy = -p_log_p.sum(-1, keepdim=True)
        value = value + (cap * entropy).sum()
        slope = p.mul_(weight[:, None] - cap * entropy).sub_(p_log_p.mul_(cap))
    hard = weight
    if soft is not None and taught is not None:
        rows, q, gap = taught
        hard, part = weight * (1.0 - soft.share), weight[rows] * soft.share[rows]
        value = value + (part * gap).sum()
        slope[rows] -= part[:, None] * q
    return value, predicted, slope.scatter_add_(-1, labels[:, None], -hard[:, None])


def _teach(logits: Tensor, labels: Tensor, soft: Soft) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a nonzero share [m], the teacher's q there [m, V], and KL(q || p) - CE [m], float32."""
    rows = soft.share.nonzero()[:, 0]
    q = soft.logits(soft.hidden[rows]).softmax(-1)
    own = logits[rows]
    return rows, q, own.gather(-1, labels[rows, None])[:, 0] - (q * own).sum(-1) + torch.xlogy(q, q).sum(-1)
