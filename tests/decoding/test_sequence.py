"""What a sequence asks of each forward and what it makes of it, on scripted models behind the real scheduler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.config import DecodeConfig
from hildanext.decoding import scheduler as scheduling
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.scheduler import Scheduler
from hildanext.decoding.sequence import Sequence
from hildanext.decoding.settings import Settings, most_passes, resolve
from hildanext.decoding.span import Vocabulary

MASK, VOCAB, EOS = 9, 9, 0


def make(**changes):
    return Settings("Q_MODE", 0.7, 0.5, 4, 4, 8, 0.0, 0)._replace(**changes)


class Scripted:
    """A runtime that knows the final text: it is sure of some positions, less so of the rest, whatever it sees."""

    name = "scripted"

    def __init__(self, answer, sure, shifted=False):
        self.answer, self.sure, self.shifted = answer, sure, shifted
        self.batches = []

    def allocate(self, slots, context):
        pass

    def copy(self, source, target, length):
        pass

    def swap(self, one, other, length):
        pass

    def erase(self, slot):
        pass

    def body(self, batch):
        self.batches.append(batch)
        return torch.stack([batch.positions, batch.ids], dim=-1).float()

    def head(self, hidden):
        logits = torch.zeros(len(hidden), VOCAB + 1)
        for row, (place, token) in enumerate(hidden.long().tolist()):
            self.predict(logits[row], place + self.shifted, token)
        return logits

    def predict(self, scores, place, token):
        scores[self.answer[place % len(self.answer)]] = 8.0 if place in self.sure else 1.0


class Restless(Scripted):
    """Wants every position changed at every pass: editing without a cap would never end."""

    def predict(self, scores, place, token):
        scores[token % 8 + 1] = 3.0
        scores[MASK] = 99.0  # and the mask token above all


def run(runtime, prompt, settings, chunk=512, ends=(EOS,), size=VOCAB):
    sequence = Sequence(
        prompt, settings, Vocabulary(size, MASK, ends, runtime.shifted), lambda ids: "".join(map(str, ids))
    )
    scheduler = Scheduler(runtime, 1, 1000, chunk)
    scheduler.submit(sequence)
    events = []
    while not scheduler.is_idle:
        events += [event for _, event in scheduler.step()]
    return sequence, [e for e in events if isinstance(e, Step)], [e for e in events if isinstance(e, Finished)]


def widths(runtime):
    return [batch.ids.shape[1] for batch in runtime.batches]


def test_a_pass_drafts_the_sure_ones_or_the_most_confident():
    _, steps, _ = run(Scripted([3, 4, 5, 6], sure={4, 6}), [7] * 4, make(max_new_tokens=4))
    assert steps[0].drafted == [0, 2]
    assert [step.drafted for step in steps[1:3]] == [[1], [3]]
    assert steps[3].drafted == steps[3].edited == []  # the pass that found nothing to change
    assert [step.mask_ratio for step in steps] == [1.0, 0.5, 0.25, 0.0]
    assert [step.start for step in steps] == [4] * 4
    assert len(steps) == 4


def test_shifted_a_blocks_first_token_is_drafted_at_once():
    """It sees the blocks before only: waiting would change nothing for it, and its block would be drafted without it."""
    _, steps, _ = run(Scripted([3, 4, 5, 6], sure={5}, shifted=True), [7] * 4, make())
    assert [step.drafted for step in steps if step.block == 1] == [[0, 1], [2], [3], []]
    assert steps[4].drafted == [0]
    # A prompt that ends inside the block holds its first token already.
    _, shared, _ = run(Scripted([3, 4, 5, 6], sure=set(), shifted=True), [8], make(max_new_tokens=3))
    assert [step.drafted for step in shared] == [[1], [2], [3], []]


def test_editing_off_ends_a_block_with_its_last_mask():
    _, steps, _ = run(Scripted([3], sure=set(range(9))), [7] * 4, make(max_new_tokens=4, tau_edit=None))
    assert len(steps) == 1


def test_the_prompt_shares_its_last_block_and_is_never_edited():
    sequence, steps, finished = run(
        Scripted([3, 4, 5, 6], sure=set(range(20))), [7, 7, 7, 7, 8], make(tau_edit=0.0, max_new_tokens=7)
    )
    assert steps[0].block == 1
    assert steps[0].tokens == [8, 4, 5, 6]
    assert steps[0].confidence[0] is None
    assert [token for event in finished for token in event.new_tokens] == [4, 5, 6, 3, 4, 5, 6]
    assert "".join(event.text for event in finished) == sequence.stream.text == "4563456"


@pytest.mark.parametrize("tau_edit", [0.5, None])
def test_end_of_text_and_the_budget_cut_the_last_block(tau_edit):
    ended, _, finished = run(Scripted([3, 4, EOS, 5], sure=set(range(20))), [7] * 4, make(tau_edit=tau_edit))
    assert finished == [Finished(1, [3, 4, EOS], "340")]
    assert ended.finish_reason == "stop"
    cut, _, finished = run(
        Scripted([3, 4, 5, 6], sure=set(range(20))), [7] * 4, make(tau_edit=tau_edit, max_new_tokens=6)
    )
    assert [event.new_tokens for event in finished] == [[3, 4, 5, 6], [3, 4]]
    assert cut.finish_reason == "length"


def test_with_editing_off_what_is_cut_off_is_not_drafted():
    """Nothing behind the end can change what is before it, so no forward is spent on it."""
    ended, steps, _ = run(Scripted([3, EOS, 5, 6], sure={4, 5}), [7] * 4, make(tau_edit=None))
    assert (len(steps), ended.finish_reason) == (1, "stop")
    _, steps, _ = run(Scripted([3, 4, 5, 6], sure={4, 5}), [7] * 4, make(tau_edit=None, max_new_tokens=2))
    assert len(steps) == 1
    # With editing on a later token may still change an earlier one: the block is run to its end.
    _, steps, _ = run(Scripted([3, EOS, 5, 6], sure={4, 5}), [7] * 4, make())
    assert len(steps) == 4


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("drafting", [1, 2, 4])
def test_no_forward_is_wasted(shifted, drafting):
    """N blocks of s passes: with editing off N s forwards, with it N (s + 1), and the prompt is in the first one."""
    sure = set(range(100)) if drafting == 1 else {p for p in range(100) if p % 4 < 5 - drafting}
    if shifted and drafting == 4:
        sure = set()  # its first token comes of itself
    off = Scripted([3], sure, shifted)
    _, steps, _ = run(off, [7] * 9, make(max_new_tokens=11, tau_edit=None))
    per_block = {block: sum(step.block == block for step in steps) for block in (3, 4)}
    assert per_block == {3: drafting, 4: drafting}
    assert len(off.batches) == len(steps)
    # Each first pass of a block also stores the block before it; the very first one the prompt.
    starts = [step.step == 0 for step in steps]
    assert widths(off) == [12 if n == 0 else 8 if starts[n] else 4 for n in range(len(steps))]
    on = Scripted([3], sure, shifted)
    _, steps, _ = run(on, [7] * 9, make(max_new_tokens=11))
    assert {block: sum(step.block == block for step in steps) for block in (3, 4)} == {3: drafting + 1, 4: drafting + 1}
    assert widths(on) == [12] + [4] * (len(steps) - 1)  # the pass that changed nothing stored the block
    assert len(on.batches) == len(steps)


def test_a_block_that_ran_out_of_passes_is_stored_with_the_next_one():
    runtime = Restless([], set())
    _, steps, _ = run(runtime, [7] * 4, make(tau_edit=0.0, max_post_steps=2, tau_mask=0.0))
    assert len(steps) == 2 * 3
    assert widths(runtime) == [8, 4, 4, 8, 4, 4]


@pytest.mark.parametrize("shifted", [False, True])
def test_a_long_prompt_goes_in_chunks_of_whole_blocks(shifted):
    runtime = Scripted([3], set(range(100)), shifted)
    sequence, steps, _ = run(runtime, [7] * 38, make(max_new_tokens=2), chunk=16)
    assert widths(runtime)[:3] == [16, 16, 8]  # the last one has the first block with it
    assert (sequence.prefill_forwards, sequence.forwards) == (2, len(steps))
    for batch in runtime.batches[:2]:
        blocks = batch.positions[0] // 4
        assert batch.visible[0].tolist() == ((blocks + 1) * 4).tolist()
    tiny_chunk = Scripted([3], set(range(100)), shifted)
    run(tiny_chunk, [7] * 12, make(max_new_tokens=4), chunk=1)  # never less than a block
    assert widths(tiny_chunk)[:4] == [4, 4, 4, 4]


@given(
    size=st.integers(1, 9), post=st.integers(0, 5), tau_mask=st.sampled_from([0.0, 0.9, 1.0]), behind=st.integers(0, 2)
)
@settings(max_examples=60, deadline=None)
def test_no_model_can_make_a_block_run_forever(size, post, tau_mask, behind):
    wanted = make(
        block_size=size,
        tau_mask=tau_mask,
        tau_edit=0.0,
        max_post_steps=post,
        edit_blocks=behind,
        max_new_tokens=3 * size,
    )
    sequence, steps, _ = run(Restless([], set()), [7] * size, wanted)
    assert MASK not in sequence.tokens
    for block in (1, 2, 3):
        mine = [step for step in steps if step.block == block]
        drafting = [step for step in mine if step.mask_ratio > 0]
        assert len(drafting) <= size
        assert len(mine) - len(drafting) == post


EXTREME = [0.0, 3.0, -30.0, 65504.0, 3e38, -3e38]


class Extreme(Scripted):
    """Logits from one end of float32 to the other, other ones at each position and for each token there."""

    def __init__(self, numbers):
        super().__init__([], set())
        self.numbers = numbers

    def predict(self, scores, place, token):
        scores[:] = torch.tensor([EXTREME[(n + place * token) % len(EXTREME)] for n in self.numbers])


@given(
    numbers=st.lists(st.integers(0, 5), min_size=VOCAB + 1, max_size=VOCAB + 1),
    decode=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1e-40, 1.0, 2.0]),
            "top_k": st.none() | st.integers(1, 3),
            "top_p": st.sampled_from([1e-40, 0.9, 1.0]),
            "repetition_penalty": st.sampled_from([0.1, 1.0, 2.0]),
            "tau_mask": st.sampled_from([0.0, 1.0]),
            "tau_edit": st.sampled_from([None, 0.0]),
            "max_post_steps": st.integers(0, 5),
            "edit_blocks": st.integers(0, 2),
            "seed": st.integers(0, 9),
        }
    ),
)
@settings(max_examples=40, deadline=None)
def test_every_request_ends_its_blocks_within_the_limit_and_never_writes_a_mask(numbers, decode):
    wanted = resolve(DecodeConfig(block_size=4, max_new_tokens=8, **decode), 4)
    sequence, steps, _ = run(Extreme(numbers), [7] * 4, wanted, size=VOCAB + 1)
    assert MASK not in sequence.stream.token_ids
    assert sequence.finish_reason in ("stop", "length")
    for block in {step.block for step in steps}:
        assert sum(step.block == block for step in steps) <= most_passes(4, wanted)


def test_no_setting_lifts_the_limit_of_passes(monkeypatch):
    """Not even settings that no configuration allows, nor a rule that proposes the mask token."""
    _, steps, _ = run(Restless([], set()), [7] * 4, make(tau_edit=0.0, max_post_steps=10**9, max_new_tokens=4))
    assert len(steps) == 4 + 256 + 1
    stuck = lambda logits, **how: (torch.full((len(logits),), MASK), torch.ones(len(logits)))  # noqa: E731
    monkeypatch.setattr(scheduling, "propose", stuck)
    for tau_edit in (None, 0.0):
        sequence, steps, _ = run(Restless([], set()), [7] * 4, make(tau_edit=tau_edit))
        assert (sequence.finish_reason, len(steps)) == ("error", 4 + 4)


def test_any_of_several_ends_ends_the_text():
    runtime = Scripted([3, 4, 5, 6], sure=set(range(100)))
    for ends, tokens in (((5, 4), [3, 4]), ((4, 5), [3, 4]), ((5, 8), [3, 4, 5]), ((8, 9), [3, 4, 5, 6])):
        for tau_edit in (None, 0.5):
            sequence, _, _ = run(runtime, [7] * 4, make(max_new_tokens=4, tau_edit=tau_edit), ends=ends)
            assert sequence.stream.token_ids == tokens
            assert sequence.finish_reason == ("length" if len(tokens) == 4 else "stop")


def test_editable_blocks_are_handed_out_when_they_leave_the_window():
    runtime = Scripted([3, 4, 5, 6], sure=set(range(100)))
    _, steps, finished = run(runtime, [7] * 4, make(max_new_tokens=16, edit_blocks=2))
    assert [(step.start, len(step.tokens)) for step in steps if step.step == 0] == [(4, 4), (4, 8), (4, 12), (8, 12)]
    assert [event.block for event in finished] == [1, 2, 3, 4]
    # A block that leaves is stored as the blocks after it will see it: once more, with the next pass.
    assert widths(runtime) == [8, 4, 8, 8, 12, 12, 16, 12]


def test_stop_strings_end_the_text_before_them_even_across_blocks():
    runtime = Scripted([3, 4, 5, 6], sure=set(range(100)))
    sequence, _, finished = run(runtime, [7] * 4, make(max_new_tokens=40, stop=("63", "99")))
    assert (sequence.stream.text, sequence.finish_reason) == ("345", "stop")
    assert sequence.stream.token_ids == [3, 4, 5]
    assert "".join(event.text for event in finished) == "345"  # the 6 was held back
    unmet, _, finished = run(runtime, [7] * 4, make(max_new_tokens=6, stop=("64", "44")))
    assert (unmet.stream.text, unmet.finish_reason) == ("345634", "length")
    assert "".join(event.text for event in finished) == "345634"
