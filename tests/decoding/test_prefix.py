"""What a slot has stored serves the next request that begins with it: fewer tokens to compute, the same tokens out."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.config import parse_config
from hildanext.decoding import runtimes
from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.settings import Settings
from support.decoding import EOS, Starved, diffusion_lm
from support.reference import reference

CONTEXT, SLOTS = 64, 3


def make(**changes):
    return Settings("Q_MODE", 0.4, 0.2, 4, 4, 8, 0.0, 0)._replace(**changes)


def open_engine(lm, runtime="eager", slots=SLOTS, chunk=8):
    engine = {"runtime": runtime, "slots": slots, "context": CONTEXT, "prefill_chunk": chunk}
    return TransformersEngine(parse_config({"engine": engine}), {}, lm)


@pytest.fixture(scope="module", params=["in_place", "shifted"])
def lm(request, tiny_tokenizer):
    return diffusion_lm(tiny_tokenizer, request.param, torch.float32)


class Turn(NamedTuple):
    """What a user does next: in which conversation, with what."""

    conversation: int
    new: list[int]  # tokens of the message
    forget: int  # of the conversation's last tokens so many are taken back first: a message edited, an answer anew
    settings: Settings
    cancelled_after: int | None  # steps


TOKENS = st.integers(4, 298)
TURNS = st.builds(
    Turn,
    st.integers(0, 3),
    st.lists(TOKENS, min_size=1, max_size=9),
    st.sampled_from([0, 0, 0, 1, 5, 11]),
    st.builds(
        make,
        tau_edit=st.sampled_from([None, 0.0, 0.2]),
        block_size=st.sampled_from([4, 4, 4, 1, 3, 8]),
        edit_blocks=st.sampled_from([0, 0, 1]),
        max_new_tokens=st.integers(1, 9),
        max_post_steps=st.sampled_from([0, 2]),
        temperature=st.sampled_from([0.0, 0.0, 1.0]),
    ),
    st.sampled_from([None, None, None, 1, 3]),
)


def converse(engine, rounds):
    """Run rounds of turns, those of a round side by side: (request, sequence) of each turn that was not cancelled."""
    texts = {}
    for turns in rounds:
        running = []
        for turn in {turn.conversation: turn for turn in turns}.values():
            # All conversations begin with the same system prompt.
            text = texts.get(turn.conversation, [7, 8, 9, 10, 11, 12, 13, 14, 15])
            text = (text[: len(text) - turn.forget] or [7]) + turn.new
            if len(text) + 16 > CONTEXT:
                text = text[:20]
            request = Request(text, turn.settings)
            running.append((turn, request, engine.submit(request)))
        steps = 0
        while not engine.scheduler.is_idle:
            for turn, _, sequence in running:
                if turn.cancelled_after == steps:
                    engine.cancel(sequence)
            if not engine.scheduler.is_idle:
                engine._step()
            steps += 1
        for turn, request, sequence in running:
            texts[turn.conversation] = request.prompt_ids + sequence.stream.token_ids
            if sequence.finish_reason is not None:
                yield request, sequence
            engine.listeners.pop(sequence, None)


@given(rounds=st.lists(st.lists(TURNS, min_size=1, max_size=4), min_size=2, max_size=6))
@settings(max_examples=6, deadline=None)
def test_tokens_with_reuse_equal_the_tokens_without(lm, rounds):
    """Conversations of any kind, in fp32, against the loop that runs the whole text at every pass and stores nothing."""
    for request, sequence in converse(open_engine(lm), rounds):
        assert sequence.stream.token_ids == reference(lm, request.prompt_ids, request.settings, EOS)[0]


def test_openvino_too(monkeypatch, lm):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setattr(runtimes, "has_openvino", lambda: True)
    engine = open_engine(lm, "openvino")
    reused = []

    @given(rounds=st.lists(st.lists(TURNS, min_size=2, max_size=4), min_size=4, max_size=6))
    @settings(max_examples=8, deadline=None)
    def compare(rounds):
        for request, sequence in converse(engine, rounds):
            assert sequence.stream.token_ids == reference(lm, request.prompt_ids, request.settings, EOS)[0]
            reused.append(sequence.prefix_tokens)

    compare()
    engine.close()
    assert sum(n >= 8 for n in reused) > 3  # else nothing was compared


def common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_longest_common_prefix_in_whole_blocks_is_reused_and_counted(lm):
    engine = open_engine(lm, slots=1)
    seen = []
    body = engine.runtime.body
    engine.runtime.body = lambda batch: seen.append((int(batch.positions[0, 0]), batch.widths[0])) or body(batch)
    wanted, shifted = make(tau_edit=None, max_new_tokens=6), lm.convention == "shifted"
    first = engine.generate(Request(list(range(20, 38)), wanted))
    assert first.stats.prefix_tokens == 0
    assert first.stats.prefill_forwards == 2
    cached = engine.scheduler.cached_sequences[0]
    assert cached.num_cached_tokens == 20
    for n_kept, new in ((18, [5] * 5), (11, [5] * 7), (9, [5] * 3), (16, []), (3, [5] * 20)):
        before, stored = cached.tokens[: cached.num_cached_tokens], cached.num_cached_tokens
        prompt = before[:n_kept] + new
        seen.clear()
        done = engine.generate(Request(prompt, wanted))
        shared = min(common(prompt, before), len(prompt) - shifted, stored) // 4 * 4
        assert done.stats.prefix_tokens == shared
        assert seen[0][0] == shared  # the first forward begins behind it
        assert done.stats.prefill_forwards == sum(place + width <= len(prompt) // 4 * 4 for place, width in seen)
        cached = engine.scheduler.cached_sequences[0]
    assert done.stats.prefix_tokens == 0


def test_another_block_size_shares_nothing(lm):
    engine = open_engine(lm, slots=1)
    prompt = list(range(20, 40))
    engine.generate(Request(prompt, make()))
    assert engine.generate(Request(prompt, make(block_size=8))).stats.prefix_tokens == 0
    assert engine.generate(Request(prompt, make(block_size=8))).stats.prefix_tokens == 16


def test_conversations_with_one_system_prompt_keep_their_own_slots(lm):
    """Three in turn, three slots: from its second turn on each finds all that it had stored. A fourth takes the oldest's."""
    engine, system = open_engine(lm), list(range(20, 28))
    wanted = make(tau_edit=None, max_new_tokens=4)
    stored, texts = {}, {}

    def turn(name):
        texts[name] = [*texts.get(name, [*system, 40 + name, 41, 42, 43]), 50, 51, 52, 53]
        done = engine.generate(Request(texts[name], wanted))
        texts[name] += done.token_ids
        cached = next(
            cached for cached in engine.scheduler.cached_sequences if cached and cached.tokens[8:9] == [40 + name]
        )
        found, stored[name] = done.stats.prefix_tokens, cached.num_cached_tokens
        return found

    assert [turn(name) for name in (1, 2, 3)] == [0, 8, 8]  # the system prompt was there already
    for name in (2, 1, 3, 3, 1):
        before = stored[name]
        assert before >= 16
        assert turn(name) == before
    assert turn(4) == 8
    assert turn(2) == 8  # its slot was the one unused for longest


def test_a_slot_is_taken_from_who_was_idle_for_longest_not_from_who_came_first(lm):
    engine, wanted = open_engine(lm, slots=2), make(tau_mask=1.0, tau_edit=None)
    long, short, third = (list(range(start, start + 12)) for start in (20, 60, 100))
    first = engine.submit(Request(long, wanted._replace(max_new_tokens=24)))
    second = engine.submit(Request(short, wanted._replace(max_new_tokens=2)))
    while not engine.scheduler.is_idle:
        engine._step()
    assert first.forwards > second.forwards  # it came first and ended last
    engine.generate(Request(third, wanted))
    assert engine.generate(Request([*long, 5, 6], wanted)).stats.prefix_tokens == 12


def test_a_prefix_that_others_copy_is_in_use(lm):
    """Two of three slots hold conversations; the system prompt's own slot is the oldest, but all began with its copy."""
    engine, wanted = open_engine(lm, slots=3), make(max_new_tokens=4)
    system = list(range(20, 36))
    first = [*system, *range(40, 50)]
    engine.generate(Request(first, wanted))
    engine.generate(Request(list(range(60, 72)), wanted))
    engine.generate(Request([*system, 8, 9, 10, 11, 12], wanted))
    engine.generate(Request(list(range(100, 112)), wanted))  # takes the slot of the second, which nobody came back to
    assert engine.generate(Request([*first, 5, 6], wanted)).stats.prefix_tokens == 24
    assert engine.generate(Request(list(range(60, 74)), wanted)).stats.prefix_tokens == 0


def test_running_beside_each_other_they_share_as_well(lm):
    engine, system = open_engine(lm, chunk=64), list(range(20, 36))
    wanted = make(max_new_tokens=12)
    first = engine.submit(Request([*system, 90], wanted))
    engine._step()
    second = engine.submit(Request([*system, 91, 92], wanted))
    while not engine.scheduler.is_idle:
        engine._step()
    assert second.prefix_tokens == 16
    for sequence, prompt in ((first, [*system, 90]), (second, [*system, 91, 92])):
        assert sequence.stream.token_ids == reference(lm, prompt, wanted, EOS)[0]


@pytest.mark.parametrize("call", ["copy", "swap"])
def test_no_memory_to_copy_a_slot_loses_no_request(lm, monkeypatch, capsys, call):
    """copy: the second one finds the first one's prompt. swap: the first one ends before it, and frees its slot."""
    engine, system = open_engine(lm), list(range(20, 36))
    requests = [Request([*system, 90 + n], make(max_new_tokens=2 + 18 * n)) for n in range(2)]
    kind, failed = type(engine.runtime), []
    real = getattr(kind, call)

    def starved(self, *args):
        if not failed:
            failed.append(args)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args)

    monkeypatch.setattr(kind, call, starved)
    sequences = [engine.submit(requests[0])]
    for _ in range(3):  # its prompt is stored
        engine._step()
    sequences.append(engine.submit(requests[1]))
    while not engine.scheduler.is_idle:
        engine._step()
    assert failed
    assert "out of memory with 3 slots: continuing with 1" in capsys.readouterr().err
    for request, sequence in zip(requests, sequences, strict=True):
        assert sequence.stream.token_ids == reference(lm, request.prompt_ids, request.settings, EOS)[0]


def test_nothing_is_found_where_the_cache_was_taken_away(lm, capsys):
    engine, wanted = open_engine(lm, slots=2), make(max_new_tokens=12)
    prompt = list(range(20, 40))
    expected = engine.generate(Request(prompt, wanted)).token_ids
    engine.close()
    again = engine.generate(Request(prompt, wanted))
    assert (again.token_ids, again.stats.prefix_tokens) == (expected, 0)
    engine.scheduler.runtime = Starved(engine.runtime, {2})  # out of memory in the middle of a reused one
    third = engine.generate(Request(prompt, wanted))
    assert (third.token_ids, third.stats.prefix_tokens) == (expected, 0)
    assert "out of memory with 2 slots" in capsys.readouterr().err
    assert engine.generate(Request(prompt, wanted)).stats.prefix_tokens > 0
    engine.scheduler.reset_prefix_cache()
    assert engine.generate(Request(prompt, wanted)).stats.prefix_tokens == 0


def test_at_rest_the_last_sequences_stay_cached(lm):
    engine = open_engine(lm)
    prompts = [[10 + i for i in range(12)], [60 + i for i in range(12)]]
    texts = [engine.generate(Request(prompt, make())).token_ids for prompt in prompts]
    last = max((cached for cached in engine.scheduler.cached_sequences if cached), key=lambda cached: cached.began)
    engine.runtime.resting_tokens = last.num_cached_tokens
    engine.rest()
    again = [engine.generate(Request(prompt, make())) for prompt in reversed(prompts)]
    assert [done.token_ids for done in again] == texts[::-1]
    assert again[0].stats.prefix_tokens > 0
    assert again[1].stats.prefix_tokens == 0
