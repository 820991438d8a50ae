"""The loss against a loop written from the formula in DESIGN section 3."""

import math

import pytest
import torch

from hildanext.objective import denoising_loss


def brute_force(logits, labels, t, masked, wrong, n, weighting, w_m2t, w_t2t, keep, cap):
    total = 0.0
    for s in range(len(labels)):
        scores = logits[s].tolist()
        log_z = math.log(sum(math.exp(x) for x in scores))
        ce = log_z - scores[labels[s]]
        if masked[s]:
            total += w_m2t * (ce / t[s] if weighting == "elbo" else ce)
            if max(range(len(scores)), key=scores.__getitem__) == labels[s]:
                total += cap * -sum(math.exp(x - log_z) * (x - log_z) for x in scores)
        elif wrong[s]:
            total += w_t2t * ce
        else:
            total += w_t2t * keep * ce
    return total / n


@pytest.mark.parametrize("weighting", ["elbo", "uniform"])
@pytest.mark.parametrize(
    ("w_m2t", "w_t2t", "keep", "cap"), [(1, 1, 1, 0), (1, 0.5, 0, 0), (2, 1, 0.3, 0.7), (1, 0, 1, 0)]
)
def test_loss_is_the_formula(weighting, w_m2t, w_t2t, keep, cap):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 7, generator=generator) * 2
    labels = torch.randint(0, 7, (30,), generator=generator)
    t = torch.rand(30, generator=generator) * 0.9 + 0.1
    kind = torch.randint(0, 3, (30,), generator=generator)
    masked, wrong = kind == 0, kind == 1
    loss, counts = denoising_loss(
        logits, labels, t, masked, wrong, 50, weighting=weighting, w_m2t=w_m2t, w_t2t=w_t2t, keep=keep, cap_weight=cap
    )
    expected = brute_force(
        logits, labels.tolist(), t.tolist(), masked.tolist(), wrong.tolist(), 50, weighting, w_m2t, w_t2t, keep, cap
    )
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    if cap == 0:
        assert loss.total.item() == pytest.approx((w_m2t * loss.m2t + w_t2t * loss.t2t).item(), rel=1e-6)
    right = logits.argmax(-1) == labels
    assert counts.masked == masked.sum()
    assert counts.masked_correct == (right & masked).sum()
    assert counts.corrupted_correct == (right & wrong).sum()


def test_loss_is_computed_in_float32_whatever_the_logits():
    logits = torch.randn(8, 5).to(torch.bfloat16)
    nothing = torch.zeros(8, dtype=torch.bool)
    loss, _ = denoising_loss(logits, torch.zeros(8, dtype=torch.long), torch.ones(8), ~nothing, nothing, 8)
    assert loss.total.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.float(), torch.zeros(8, dtype=torch.long))
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_splitting_a_batch_changes_nothing_when_the_count_is_global():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(20, 6, generator=generator), torch.randint(0, 6, (20,), generator=generator)
    t, masked = torch.full((20,), 0.5), torch.rand(20, generator=generator) < 0.5
    wrong = torch.zeros(20, dtype=torch.bool)
    whole = denoising_loss(logits, labels, t, masked, wrong, 20)[0].total
    parts = [
        denoising_loss(logits[i], labels[i], t[i], masked[i], wrong[i], 20)[0].total
        for i in (slice(0, 7), slice(7, 20))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
