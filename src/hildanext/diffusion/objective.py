"""The denoising loss: M2T (fill masks) plus T2T (repair wrong tokens, keep right ones). fp32 sums over a global count.

Source: LLaDA2.0 eq. 1-2 (ELBO weight 1/t of the linear schedule) and section 5.2 (CAP), LLaDA2.1 section 3 (T2T).
The head runs on a few supervised positions at a time, forward and backward together: [S, V] logits never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 1 << 24  # numbers in a chunk of logits: 64 MB in fp32, whatever the vocabulary


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


class Soft(NamedTuple):
    """A distribution that takes a share of the label's place as the target, made a few positions at a time."""

    hidden: Tensor  # [S, H'] the teacher's hidden states
    logits: Callable[[Tensor], Tensor]  # [n, H'] -> [n, V] float32; -inf where nothing is predicted
    share: Tensor  # [S] float32 in [0, 1]; 0: the label alone


class Predicted(NamedTuple):
    """What the head said at S positions, without gradient."""

    ce: Tensor  # [S] float32, nats
    best: Tensor  # [S] int64, the most likely id but for the mask token


def denoising_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    t: Tensor,
    is_masked: Tensor,
    is_wrong: Tensor,
    n_tokens: int,
    *,
    mask_token_id: int | None = None,
    weighting: str = "elbo",
    w_m2t: float = 1.0,
    w_t2t: float = 1.0,
    keep: float = 1.0,
    cap_weight: float = 0.0,
    soft: Soft | None = None,
) -> tuple[Loss, Counts, Predicted]:
    """Loss over the supervised positions only (S of them, over the whole micro-batch), counts, and what was predicted.

    hidden [S, H] any float dtype, head: [n, H] -> logits [n, V], labels [S] int64 (always x_0), t [S] float32, is_masked
    [S] bool, is_wrong [S] bool (observed, and not the clean token). The other positions are observed and right: "keep"
    positions, weighted `keep` inside T2T. n_tokens: allowed tokens of the whole effective batch, over all processes.

        total = w_m2t * sum_masked(w(t) CE) / N + w_t2t * (sum_wrong CE + keep * sum_right CE) / N,  w(t) = 1/t or 1

    The mask token is never the best id: decoding cannot predict it either.
    cap_weight adds the confidence loss of LLaDA2.0 section 5.2: the entropy of correctly predicted masked tokens.
    soft: CE becomes (1 - share) CE + share KL(q || p) with the teacher's q (Hinton et al. 2015, arXiv 1503.02531, at
    temperature 1) in `total`; the other numbers keep the label's CE.
    """
    masked, wrong = is_masked.float(), is_wrong.float()
    m2t_weight = masked / t if weighting == "elbo" else masked
    t2t_weight = wrong + keep * (1.0 - masked - wrong)
    # The function works with weights of about 1 and divides by N at the end: fp16 gradients of 1/N would vanish.
    summed, ce, best = _HeadLoss.apply(
        hidden,
        head,
        labels,
        w_m2t * m2t_weight + w_t2t * t2t_weight,
        cap_weight * masked if cap_weight else None,
        mask_token_id,
        soft,
        *trainable(head),
    )
    correct = (best == labels).float()
    with torch.no_grad():
        loss = Loss(summed / n_tokens, (ce * m2t_weight).sum() / n_tokens, (ce * t2t_weight).sum() / n_tokens)
        counts = Counts(
            masked.sum(), (ce * masked).sum(), (correct * masked).sum(), wrong.sum(), (correct * wrong).sum()
        )
    return loss._replace(total=summed / n_tokens), counts, Predicted(ce, best)


def weighted_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * CE) over S positions, fp32 scalar; weights [S] may be negative. The head runs on a few at a time."""
    summed, _, _ = _HeadLoss.apply(hidden, head, labels, weight, None, None, None, *trainable(head))
    return summed


def trainable(head: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in head.parameters() if parameter.requires_grad]


@torch.no_grad()
def predict(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, mask_token_id: int | None = None
) -> Predicted:
    """Cross-entropy of `labels` [S] and the best id at hidden states [S, H], a few positions at a time."""
    parts = [
        _predict(head(h).to(torch.float32, copy=True), y, mask_token_id)[0] for h, y in _chunks(hidden, head, labels)
    ]
    return Predicted(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _chunks(hidden: Tensor, head: Callable[[Tensor], Tensor], *others: Tensor) -> zip[tuple[Tensor, ...]]:
    """Tensors of S positions each, cut so that a chunk's logits stay below LOGITS_AT_ONCE; one empty chunk for S = 0."""
    vocabulary = head(hidden[:1].detach()).shape[-1] if len(hidden) else 1
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return zip(*(tensor.split(size) for tensor in (hidden, *others)), strict=True)


def _predict(logits: Tensor, labels: Tensor, mask_token_id: int | None) -> tuple[Predicted, Tensor]:
    """What float32 logits [n, V] predict, and the sum [n, 1] of their exponentials, which take the logits' place."""
    if mask_token_id is None:
        best = logits.argmax(-1)
        top = logits.gather(-1, best[:, None])
    else:
        its_own = logits[:, mask_token_id, None].clone()
        logits[:, mask_token_id] = -torch.inf
        best = logits.argmax(-1)
        top = torch.maximum(logits.gather(-1, best[:, None]), its_own)
        logits[:, mask_token_id, None] = its_own
    logits.sub_(top)
    at_label = logits.gather(-1, labels[:, None])
    z = logits.exp_().sum(-1, keepdim=True)
    return Predicted((z.log() - at_label)[:, 0], best), z


def _cast(head: nn.Module, device_type: str) -> dict[str, Tensor]:
    """The head's weights as autocast would cast them: once, not for every chunk; leaves whose gradients stay in that type."""
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return {
        name: parameter.detach().to(dtype or parameter.dtype).requires_grad_(parameter.requires_grad)
        for name, parameter in head.named_parameters()
        if parameter.is_floating_point()  # not what is quantized
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
            value, one, slope = _slope(logits.detach(), y, w, None if cap is None else c, mask_token_id, chunk)
            total += value
            found.append(one)
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
    """Value of a chunk's loss, what it predicts, and the loss's gradient at its logits [n, V], float32.

    With p = softmax(logits), the cross-entropy's is p - onehot, KL(q || p)'s p - q, the entropy's -p (log p + H).
    """
    p = logits.to(torch.float32, copy=True)
    taught = None if soft is None else _teach(p, labels, soft)
    one, z = _predict(p, labels, mask_token_id)
    value = (weight * one.ce).sum()
    if cap is None:
        slope = p.mul_(weight[:, None] / z)
    else:
        cap = (cap * (one.best == labels))[:, None]
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
    return value, one, slope.scatter_add_(-1, labels[:, None], -hard[:, None])


def _teach(logits: Tensor, labels: Tensor, soft: Soft) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that have a share [m], the teacher's q there [m, V], and KL(q || p) - CE [m], float32."""
    rows = soft.share.nonzero()[:, 0]
    q = soft.logits(soft.hidden[rows]).softmax(-1)
    own = logits[rows]
    return rows, q, own.gather(-1, labels[rows, None])[:, 0] - (q * own).sum(-1) + torch.xlogy(q, q).sum(-1)
