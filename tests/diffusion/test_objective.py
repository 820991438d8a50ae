"""The loss against a loop written from the formula in docs/design.md section 3."""

import math

import pytest
import torch
from torch import nn

from hildanext.diffusion import objective
from hildanext.diffusion.objective import Target, Weights, denoising_loss


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
    loss, counts, predicted = denoising_loss(
        logits, nn.Identity(), Target(labels, t, masked, wrong), 50, Weights(weighting, w_m2t, w_t2t, keep, cap)
    )
    expected = brute_force(
        logits, labels.tolist(), t.tolist(), masked.tolist(), wrong.tolist(), 50, weighting, w_m2t, w_t2t, keep, cap
    )
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    if cap == 0:
        assert loss.total.item() == pytest.approx((w_m2t * loss.m2t + w_t2t * loss.t2t).item(), rel=1e-6)
    right = logits.argmax(-1) == labels
    assert torch.equal(predicted.best, logits.argmax(-1))
    assert counts.masked == masked.sum()
    assert counts.masked_correct == (right & masked).sum()
    assert counts.corrupted_correct == (right & wrong).sum()


def test_loss_is_computed_in_float32_whatever_the_logits():
    logits = torch.randn(8, 5).to(torch.bfloat16)
    nothing = torch.zeros(8, dtype=torch.bool)
    target = Target(torch.zeros(8, dtype=torch.long), torch.ones(8), ~nothing, nothing)
    loss, *_ = denoising_loss(logits, nn.Identity(), target, 8, Weights())
    assert loss.total.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.float(), torch.zeros(8, dtype=torch.long))
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_splitting_a_batch_changes_nothing_when_the_count_is_global():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(20, 6, generator=generator), torch.randint(0, 6, (20,), generator=generator)
    t, masked = torch.full((20,), 0.5), torch.rand(20, generator=generator) < 0.5
    wrong = torch.zeros(20, dtype=torch.bool)
    target = Target(labels, t, masked, wrong)
    whole = denoising_loss(logits, nn.Identity(), target, 20, Weights())[0].total
    parts = [
        denoising_loss(logits[i], nn.Identity(), Target(*(field[i] for field in target)), 20, Weights())[0].total
        for i in (slice(0, 7), slice(7, 20))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize(("cap", "n_chunks"), [(0.0, 1), (0.7, 1), (0.7, 4)])
@pytest.mark.parametrize("trained", [True, False])
def test_gradients_are_those_of_the_plain_formula(monkeypatch, cap, n_chunks, trained):
    """Chunk by chunk, forward and backward at once, against autograd through full logits."""
    generator = torch.Generator().manual_seed(2)
    size, vocabulary = 24, 11
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", size * vocabulary // n_chunks)
    head = nn.Linear(5, vocabulary, dtype=torch.float64).requires_grad_(trained)
    hidden = torch.randn(size, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocabulary, (size,), generator=generator)
    t = torch.rand(size, generator=generator) * 0.9 + 0.1
    kind = torch.randint(0, 3, (size,), generator=generator)
    masked, wrong = kind == 0, kind == 1
    with torch.no_grad():  # some are predicted rightly: CAP has something to do
        hidden[masked] += 3 * head.weight[labels[masked]]
    weights = Weights(w_t2t=0.5, keep=0.3, cap_weight=cap)
    loss, *_ = denoising_loss(hidden, head, Target(labels, t, masked, wrong), 40, weights)
    found = torch.autograd.grad(loss.total * 3, [hidden, *(p for p in head.parameters() if trained)])
    log_p = head(hidden).float().log_softmax(-1)
    ce = -log_p[torch.arange(size), labels]
    weight = masked / t + 0.5 * (wrong + 0.3 * (kind == 2))
    right = masked & (log_p.argmax(-1) == labels)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = ((ce * weight).sum() + cap * (entropy * right).sum()) / 40
    assert right.any()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = torch.autograd.grad(expected * 3, [hidden, *(p for p in head.parameters() if trained)])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_half_precision_gradients_do_not_vanish_in_a_large_batch():
    """With N in the millions a token's weight is below what fp16 can hold; the gradient must not be."""
    head = nn.Linear(4, 6, dtype=torch.float16)
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    yes = torch.ones(3, dtype=torch.bool)
    target = Target(torch.tensor([0, 1, 2]), torch.ones(3), yes, ~yes)
    loss, *_ = denoising_loss(hidden, head, target, 1 << 24, Weights())
    (slope,) = torch.autograd.grad(loss.total * 2.0**24, [hidden])  # a loss scaler's factor
    wide = hidden.detach().double().requires_grad_()
    summed = nn.functional.cross_entropy(
        wide @ head.weight.double().T + head.bias.double(), torch.tensor([0, 1, 2]), reduction="sum"
    )
    torch.testing.assert_close(slope.double(), torch.autograd.grad(summed, [wide])[0], rtol=2e-2, atol=2e-3)


def test_the_mask_token_is_never_the_best_id():
    logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, 0.0, 1.0]])
    predicted = objective.predict(logits, nn.Identity(), torch.tensor([2, 0]), mask_token_id=1)
    assert predicted.best.tolist() == [2, 0]
    torch.testing.assert_close(
        predicted.ce, nn.functional.cross_entropy(logits, torch.tensor([2, 0]), reduction="none")
    )


def test_nothing_supervised_is_a_loss_of_zero():
    head = nn.Linear(4, 6)
    hidden = torch.empty(0, 4, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.bool)
    target = Target(torch.empty(0).long(), torch.empty(0), nothing, nothing)
    loss, counts, predicted = denoising_loss(hidden, head, target, 1, Weights())
    loss.total.backward()
    assert (loss.total.item(), counts.masked.item(), len(predicted.best)) == (0.0, 0.0, 0)
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
