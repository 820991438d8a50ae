"""The threshold-edit rule against a loop written from LLaDA2.1 eq. 1-3, and the block loop on scripted models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.config import DecodeConfig, parse_config
from hildanext.decode import Finished, Settings, Step, check_request, decode, decode_block, edit_step, propose, resolve
from hildanext.errors import ConfigError, UsageError

MASK, VOCAB, EOS = 9, 9, 0


def rule(tokens, ids, confidence, editable, settled, tau_mask, tau_edit):
    """Eq. 1-3, position by position; what is settled is drafted at once."""
    masked = [i for i, token in enumerate(tokens) if token == MASK]
    gamma = [i for i in masked if confidence[i] > tau_mask or settled[i]]
    if masked and not gamma:
        gamma = [max(masked, key=lambda i: confidence[i])]
    delta = []
    if tau_edit is not None:
        delta = [
            i
            for i, token in enumerate(tokens)
            if token != MASK and editable[i] and ids[i] != token and confidence[i] > tau_edit
        ]
    return [ids[i] if i in gamma or i in delta else token for i, token in enumerate(tokens)], gamma, delta


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(0, 20), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    tau_mask=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    tau_edit=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_edit_step_is_the_rule(rows, tau_mask, tau_edit):
    tokens, ids, twentieths, editable, settled = (list(part) for part in zip(*rows, strict=True))
    confidence = [value / 20 for value in twentieths]
    editable = [e or token == MASK for e, token in zip(editable, tokens, strict=True)]  # a prompt holds no masks
    new, drafted, edited = edit_step(
        torch.tensor(tokens),
        torch.tensor(ids),
        torch.tensor(confidence),
        torch.tensor(editable),
        mask_token_id=MASK,
        tau_mask=tau_mask,
        tau_edit=tau_edit,
        settled=torch.tensor(settled) if any(settled) else None,
    )
    confidence = torch.tensor(confidence).tolist()  # float32, as the rule saw it
    expected, gamma, delta = rule(tokens, ids, confidence, editable, settled, tau_mask, tau_edit)
    assert new.tolist() == expected
    assert drafted.nonzero()[:, 0].tolist() == sorted(gamma)
    assert edited.nonzero()[:, 0].tolist() == delta


def test_propose_never_gives_the_mask_token_or_a_padding_row():
    logits = torch.tensor([[0.0, 1.0, 9.0, 3.0, 99.0], [0.0, 5.0, 9.0, 1.0, 0.0]])
    ids, confidence = propose(logits, torch.tensor([True, False]), mask_token_id=2, vocab_size=4)
    assert ids.tolist() == [3, 1]
    kept = logits[:, [0, 1, 3]].softmax(-1)
    assert confidence.tolist() == pytest.approx([kept[0, 2].item(), kept[1, 1].item()])


def test_propose_samples_masked_positions_at_the_softmax_rate_and_keeps_the_argmax_elsewhere():
    logits = torch.tensor([[1.0, 0.0, 0.5, -50.0]]).expand(20_000, 4)
    masked = torch.arange(20_000) < 10_000
    generator = torch.Generator().manual_seed(0)
    ids, confidence = propose(logits, masked, mask_token_id=3, vocab_size=4, temperature=0.7, generator=generator)
    assert (ids[~masked] == 0).all()
    warm = (logits[0, :3] / 0.7).softmax(-1)
    rates = torch.bincount(ids[masked], minlength=3).float() / 10_000
    assert rates.tolist() == pytest.approx(warm.tolist(), abs=0.02)
    assert torch.allclose(confidence[masked], warm[ids[masked]])


class Scripted:
    """A context that knows the final text: it is sure of some positions, and of the rest only when they are observed."""

    def __init__(self, answer, sure, start=0, shifted=False):
        self.answer, self.sure, self.start, self.shifted = answer, sure, start, shifted
        self.forwards, self.stored = 0, []

    def score(self, tokens):
        self.forwards += 1
        logits = torch.zeros(len(tokens), VOCAB + 1)
        for i in range(len(tokens)):
            place = self.start + len(self.stored) * len(tokens) + i
            logits[i, self.answer[place % len(self.answer)]] = 8.0 if place in self.sure else 1.0
        return logits

    def store(self, tokens):
        self.stored.append(tokens.tolist())


def make(**changes):
    return Settings("Q_MODE", 0.7, 0.5, 4, 4, 8, 0.0, 0)._replace(**changes)


def run(context, prompt, settings):
    return list(
        decode(
            context,
            prompt,
            settings,
            mask_token_id=MASK,
            vocab_size=VOCAB,
            eos_token_id=EOS,
            device=torch.device("cpu"),
        )
    )


def test_a_pass_drafts_the_sure_ones_or_the_most_confident():
    steps = [e for e in run(Scripted([3, 4, 5, 6], sure={0, 2}), [], make(max_new_tokens=4)) if isinstance(e, Step)]
    assert steps[0].drafted == [0, 2]
    assert [step.drafted for step in steps[1:3]] == [[1], [3]]
    assert steps[3].drafted == steps[3].edited == []  # the pass that found nothing to change
    assert [step.mask_ratio for step in steps] == [1.0, 0.5, 0.25, 0.0]
    assert len(steps) == 4


def test_shifted_a_blocks_first_token_is_drafted_at_once():
    """It sees the blocks before only: waiting would change nothing for it, and its block would be drafted without it."""
    events = run(Scripted([3, 4, 5, 6], sure={1}, shifted=True), [], make(max_new_tokens=8))
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.drafted for step in steps if step.block == 0] == [[0, 1], [2], [3], []]
    assert steps[4].drafted == [0]
    # A prompt that ends inside the block holds its first token already.
    shared = run(Scripted([3, 4, 5, 6], sure=set(), shifted=True), [8], make(max_new_tokens=3))
    assert [event.drafted for event in shared if isinstance(event, Step)] == [[1], [2], [3], []]


def test_editing_off_ends_a_block_with_its_last_mask():
    steps = [
        e
        for e in run(Scripted([3], sure=set(range(9))), [], make(max_new_tokens=4, tau_edit=None))
        if isinstance(e, Step)
    ]
    assert len(steps) == 1


def test_the_prompt_shares_its_last_block_and_is_never_edited():
    events = run(
        Scripted([3, 4, 5, 6], sure=set(range(20)), start=4), [7, 7, 7, 7, 8], make(tau_edit=0.0, max_new_tokens=7)
    )
    steps = [e for e in events if isinstance(e, Step)]
    assert steps[0].block == 1
    assert steps[0].tokens == [8, 4, 5, 6]
    new = [token for e in events if isinstance(e, Finished) for token in e.new_tokens]
    assert new == [4, 5, 6, 3, 4, 5, 6]


def test_end_of_text_and_the_budget_cut_the_last_block():
    ended = run(Scripted([3, 4, EOS, 5], sure=set(range(20))), [], make())
    assert ended[-1] == Finished(0, [3, 4, EOS])
    cut = run(Scripted([3, 4, 5, 6], sure=set(range(20))), [], make(max_new_tokens=6))
    assert [e.new_tokens for e in cut if isinstance(e, Finished)] == [[3, 4, 5, 6], [3, 4]]


class Restless:
    """Wants every position changed at every pass: editing without a cap would never end."""

    forwards, shifted = 0, False

    def score(self, tokens):
        self.forwards += 1
        logits = torch.zeros(len(tokens), VOCAB + 1)
        logits[torch.arange(len(tokens)), (tokens % 8) + 1] = 3.0
        logits[:, MASK] = 99.0  # and the mask token above all
        return logits

    def store(self, tokens):
        pass


@given(size=st.integers(1, 9), post=st.integers(0, 5), tau_mask=st.sampled_from([0.0, 0.9, 1.0]))
@settings(max_examples=40, deadline=None)
def test_no_model_can_make_a_block_run_forever(size, post, tau_mask):
    context = Restless()
    steps = list(
        decode_block(
            context,
            torch.full((size,), MASK),
            torch.ones(size, dtype=torch.bool),
            0,
            make(block_size=size, tau_mask=tau_mask, tau_edit=0.0, max_post_steps=post),
            MASK,
            VOCAB,
        )
    )
    assert MASK not in steps[-1].tokens
    drafting = [step for step in steps if step.mask_ratio > 0]
    assert len(drafting) <= size
    assert len(steps) - len(drafting) == post


def test_presets_and_overrides():
    assert resolve(DecodeConfig(mode="S_MODE"), 8)[:3] == ("S_MODE", 0.5, 0.0)
    assert resolve(DecodeConfig(mode="Q_MODE"), 8)[:3] == ("Q_MODE", 0.7, 0.5)
    off = resolve(DecodeConfig(mode="S_MODE", tau_edit=None, tau_mask=0.9, block_size=16), 8)
    assert (off.tau_mask, off.tau_edit, off.block_size) == (0.9, None, 16)


@pytest.mark.parametrize(
    "changes", [{"tau_mask": 1.5}, {"tau_edit": -0.1}, {"block_size": 0}, {"max_new_tokens": 0}, {"temperature": -1}]
)
def test_impossible_settings_name_their_key(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        parse_config({"decode": changes})


def test_a_request_must_fit():
    with pytest.raises(UsageError, match="empty"):
        check_request([], make(), 100)
    with pytest.raises(UsageError, match=r"90 tokens.*max_new_tokens \(9\).*context of 99"):
        check_request([1] * 90, make(max_new_tokens=9), 99)  # 99 tokens, but 100 in whole blocks
    check_request([1] * 90, make(max_new_tokens=9), 100)
