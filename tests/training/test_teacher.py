"""Distillation from the AR base: fair positions, targets, gradients, and that the student stays as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hildanext.config import parse_config
from hildanext.data.rows import Rows
from hildanext.diffusion import objective
from hildanext.diffusion.noise import Noisy, left_visible
from hildanext.diffusion.objective import Soft, Target, Weights, denoising_loss
from hildanext.errors import ConfigError
from hildanext.model.diffusion_lm import make_batch
from hildanext.model.loading import load_diffusion_lm, weights_of
from hildanext.model.pretrained import load_causal_lm
from hildanext.training.ar_base import next_token_losses
from hildanext.training.convert import convert_wsd
from hildanext.training.teacher import Teacher
from support.training import material


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_fair_positions_are_those_a_loop_finds(data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    block_size = data.draw(st.sampled_from([1, 2, 3, 4, 100]))
    positions = [p for n in lengths for p in range(n)]
    kinds = data.draw(st.lists(st.sampled_from("mwo"), min_size=len(positions), max_size=len(positions)))
    expected = []
    for i, position in enumerate(positions):
        before = range(i - position % block_size, i)  # in its own block; earlier blocks are clean
        expected.append(kinds[i] == "m" and all(kinds[j] == "o" for j in before))
    masked, wrong = (torch.tensor([[k == kind for k in kinds]]) for kind in "mw")
    noisy = Noisy(torch.zeros(1, len(kinds)), masked, wrong, torch.ones(1, len(kinds)), torch.zeros(1, len(kinds)))
    assert left_visible(noisy, torch.tensor([positions]), block_size).tolist() == [expected]


@pytest.mark.parametrize("chunk", [1 << 24, 5 * 7])
@pytest.mark.parametrize("cap", [0.0, 0.4])
def test_loss_and_gradient_are_those_of_autograd_on_all_logits(monkeypatch, chunk, cap):
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", chunk)
    generator = torch.Generator().manual_seed(0)
    head, teacher = nn.Linear(6, 7), nn.Linear(4, 7)
    hidden = torch.randn(20, 6, generator=generator, requires_grad=True)
    taught = torch.randn(20, 4, generator=generator) * 3
    labels, t = torch.randint(0, 6, (20,), generator=generator), torch.rand(20, generator=generator) * 0.9 + 0.1
    kind = torch.randint(0, 3, (20,), generator=generator)
    masked, wrong = kind == 0, kind == 1
    share = torch.where(masked, torch.rand(20, generator=generator), torch.zeros(()))

    def teach(h):
        logits = teacher(h).detach()
        logits[:, 6] = -torch.inf
        return logits

    target, weights, soft = Target(labels, t, masked, wrong), Weights(cap_weight=cap), Soft(taught, teach, share)
    loss, *_ = denoising_loss(hidden, head, target, 30, weights, mask_token_id=6, soft=soft)
    found = torch.autograd.grad(loss.total, [hidden, *head.parameters()])

    log_p, q = head(hidden).log_softmax(-1), teach(taught).softmax(-1)
    ce = -log_p.gather(-1, labels[:, None])[:, 0]
    kl = (torch.xlogy(q, q) - q * log_p).sum(-1)
    weight = torch.where(masked, 1 / t, torch.ones(()))
    right = masked & (head(hidden)[:, :6].argmax(-1) == labels)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = ((weight * ((1 - share) * ce + share * kl)).sum() + cap * entropy[right].sum()) / 30
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected, [hidden, *head.parameters()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def opened(config):
    lm, policy = load_diffusion_lm(config.model, training=True, lora=config.lora)
    rows = Rows.open(f"{config.paths.data}/tokenized/train.rows")
    batch = make_batch(lm, [0, 1, 2], rows.batch([0, 1, 2]))
    return lm, Teacher(lm, config, policy), batch


@pytest.mark.parametrize("rank", [None, 4])
def test_the_teacher_is_the_base_and_leaves_the_student_alone(tmp_path, tiny_base, rank):
    """An adapter that has moved is off while the base speaks, and as it was afterwards."""
    config = material(tmp_path, tiny_base, lora={"rank": rank}, loss={"distill": 0.5})
    lm, teacher, batch = opened(config)
    assert (teacher.beside is None) == (rank is not None)
    with torch.no_grad():
        for value in weights_of(lm).values():
            value.add_(torch.randn(value.shape) * 0.1)
    lm.model.train()
    before = {name: value.clone() for name, value in weights_of(lm).items()}
    states = teacher.states(batch)
    wanted = batch.allowed & (batch.position_ids > 0)
    row, column = wanted.nonzero(as_tuple=True)
    logits = teacher.logits(states[row, column - 1])
    assert all(torch.equal(before[name], value) for name, value in weights_of(lm).items())
    assert lm.model.training

    base, _ = load_causal_lm(config.model, load_diffusion_lm(config.model)[1], torch.float32)
    clean = batch._asdict() | {"loss_mask": batch.allowed}
    with torch.no_grad():
        expected = next_token_losses(base, clean)
    full = logits.clone()
    full[:, lm.mask_token_id] = -torch.inf
    found = nn.functional.cross_entropy(full, batch.input_ids[wanted], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert full.shape[1] == lm.head.weight.shape[0]


def test_a_fresh_adapter_at_block_size_one_has_nothing_to_learn_from_the_base(tmp_path, tiny_base):
    """There the student sees what the base sees: KL is 0, so only the labels' share of the loss is left."""
    config = material(tmp_path, tiny_base, lora={"rank": 4}, loss={"distill": 1.0})
    lm, teacher, batch = opened(config)
    masked = batch.allowed
    noisy_ids = batch.input_ids.masked_fill(masked, lm.mask_token_id)
    noisy = Noisy(noisy_ids, masked, masked & False, torch.ones(masked.shape), batch.input_ids)
    soft = teacher.soft(teacher.states(batch), batch, noisy, masked, 1)
    assert (soft.share == 1).all()
    hidden = lm(batch, noisy_ids, masked, 1)
    target = Target(batch.input_ids[masked], noisy.t[masked], masked[masked], ~masked[masked])
    loss, *_ = denoising_loss(hidden, lm.head, target, 10, Weights(), soft=soft)
    # The student's own distribution also has the mask token and the padding rows; hence not exactly 0.
    assert abs(loss.total.item()) < 0.02 * loss.m2t.item()


def test_a_distilled_run_learns_and_resumes_to_the_same_weights(tmp_path, tiny_base):
    config = material(tmp_path, tiny_base, lora={"rank": 4}, loss={"distill": 0.5})
    whole = convert_wsd(config, "whole")
    config_short = config.model_copy(deep=True)
    again = convert_wsd(config_short, "again")
    assert whole["eval_loss"] == again["eval_loss"]
    other = convert_wsd(config.model_copy(update={"loss": config.loss.model_copy(update={"distill": 0.0})}), "off")
    assert other["eval_loss"] != whole["eval_loss"]


def test_a_sharded_base_is_refused():
    with pytest.raises(ConfigError, match=r"'loss\.distill': needs the complete base"):
        parse_config({"loss": {"distill": 0.5}, "train": {"sharding": "fsdp2"}})
