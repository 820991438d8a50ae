"""Continuous batching on a random Llama: the same tokens as without any cache, whoever runs beside, whenever it joins."""

import random
from functools import partial

import pytest
import torch

from hildanext.config import parse_config
from hildanext.decoding import runtimes
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.settings import Settings
from hildanext.errors import ModelError, NonFiniteLogitsError, UsageError
from support.decoding import DELETE, EOS, INSERT, MASK, Starved, diffusion_lm
from support.reference import reference

CONTEXT = 64


def open_engine(lm, slots=8, chunk=16, runtime="eager"):
    engine = {"order": ["transformers"], "runtime": runtime, "slots": slots, "context": CONTEXT, "prefill_chunk": chunk}
    return TransformersEngine(parse_config({"engine": engine}), {}, lm)


@pytest.fixture(scope="module", params=["in_place", "shifted"])
def lm(request, tiny_tokenizer):
    return diffusion_lm(tiny_tokenizer, request.param)


def make(**changes):
    return Settings("Q_MODE", 0.4, 0.2, 4, 4, 12, 0.0, 0)._replace(**changes)


def some_settings(rng):
    """Anything a request may ask for."""
    return make(
        tau_mask=rng.choice([0.1, 0.4, 0.9]),
        tau_edit=rng.choice([None, 0.0, 0.2, 0.5]),
        max_post_steps=rng.choice([0, 1, 4]),
        block_size=rng.choice([1, 3, 4, 8]),
        max_new_tokens=rng.randint(1, 20),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        seed=rng.randint(0, 5),
        top_k=rng.choice([None, 5]),
        top_p=rng.choice([1.0, 0.8]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.5]),
        edit_blocks=rng.choice([0, 0, 1, 2]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.7, -1.0]),
        min_p=rng.choice([0.0, 0.3]),
        logit_bias=rng.choice([(), (), ((40, 3.0), (7, -100.0))]),
        logprobs=rng.choice([None, 0, 3]),
    )


def some_prompt(rng):
    return [rng.randrange(4, 299) for _ in range(rng.randint(1, 36))]


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("tau_edit", [None, 0.0, 0.2])
def test_the_cache_changes_nothing(lm, tau_edit, behind):
    """Against the whole text run at every pass, with no cache: tokens and number of passes, editable blocks included."""
    rng = random.Random(7)
    engine, edits, rolled = open_engine(lm, slots=1), 0, 0
    for length in range(1 + behind % 2, 21, 2):
        wanted = make(tau_edit=tau_edit, edit_blocks=behind, max_new_tokens=16 - length % 4, max_post_steps=3)
        prompt = [rng.randrange(4, 299) for _ in range(length)]
        done = engine.generate(Request(prompt, wanted))
        tokens, passes, _ = reference(lm, prompt, wanted, EOS)
        assert done.token_ids == tokens
        if EOS not in tokens:
            assert done.stats.forwards == passes
        edits += done.stats.edits
        rolled += done.token_ids != engine.generate(Request(prompt, wanted._replace(edit_blocks=0))).token_ids
    if tau_edit is not None:
        assert edits > 20  # else this compares drafting only
        assert behind == 0 or rolled > 3  # and editable blocks must have mattered


@pytest.fixture(params=["eager", "compiled", "openvino"])
def runtime(request, monkeypatch):
    """A runtime that this machine has. Graphs are traced alike by every backend of torch.compile; this one is fast."""
    if request.param == "compiled":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        torch._dynamo.reset()
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
        monkeypatch.setattr(runtimes, "has_openvino", lambda: True)
    return request.param


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("convention", ["in_place", "shifted"])
def test_insertions_and_deletions_equal_the_slow_way(tiny_tokenizer, convention, runtime):
    """Any settings, drafts to be repaired or none, side by side: the same tokens and log-probabilities as without a cache."""
    rng = random.Random(3)
    dtype = torch.float32 if runtime == "openvino" else torch.float64
    make_lm = partial(diffusion_lm, tiny_tokenizer, convention, dtype, edits=True)
    edits_lm = make_lm()
    engine = open_engine(make_lm(), runtime=runtime)  # OpenVINO empties the model
    requests = []
    for _ in range(40):
        wanted = some_settings(rng)._replace(max_post_steps=rng.choice([1, 2, 4]))
        wanted = wanted._replace(min_indel_confidence=None if wanted.tau_edit is None else rng.choice([0.0, 0.0, 0.1]))
        draft = None
        if wanted.tau_edit is not None and rng.random() < 0.5:
            draft = [rng.randrange(4, 297) for _ in range(rng.randint(1, 20))]
        wanted = wanted if draft is None else wanted._replace(logprobs=None)
        prompt = [min(token, INSERT - 1) for token in some_prompt(rng)]
        requests.append(Request(prompt, wanted, draft=draft))
    steps = []
    completions = engine.generate_batch(requests, lambda index, event: steps.append((index, event)))
    engine.close()
    for request, done in zip(requests, completions, strict=True):
        tokens, passes, logps = reference(edits_lm, request.prompt_ids, request.settings, EOS, request.draft)
        assert done.token_ids == tokens, request
        assert not {MASK, DELETE, INSERT} & set(tokens)
        if EOS not in tokens and request.settings.tau_edit is not None and request.settings.block_size > 1:
            assert done.stats.forwards == passes
        for logp, found in zip(logps, done.logprobs or [], strict=False):  # few requests ask for them
            assert found.logprob == pytest.approx(float(logp[found.token]), abs=1e-4)
    assert sum(done.stats.insertions for done in completions) > 20
    assert sum(done.stats.deletions for done in completions) > 20
    for _, step in steps:
        if isinstance(step, Step):
            assert all(step.tokens[place] == MASK for place in step.inserted)
            assert not {MASK, DELETE, INSERT} & {step.tokens[place] for place in (*step.drafted, *step.edited)}


def test_anything_a_request_may_ask_for_equals_the_slow_way(lm):
    rng = random.Random(1)
    engine = open_engine(lm)
    requests = [Request(some_prompt(rng), some_settings(rng)) for _ in range(60)]
    for request, done in zip(requests, engine.generate_batch(requests), strict=True):
        tokens, _, logps = reference(lm, request.prompt_ids, request.settings, EOS)
        assert done.token_ids == tokens, request
        if request.settings.logprobs is None:
            assert done.logprobs is None
            continue
        assert done.logprobs is not None
        for token, logp, found in zip(tokens, logps, done.logprobs, strict=True):
            assert found.token == token
            assert found.logprob == pytest.approx(float(logp[token]), abs=1e-4)
            best = logp.topk(request.settings.logprobs)
            assert [token for token, _ in found.top] == best.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("convention", ["in_place", "shifted"])
def test_a_row_does_not_depend_on_who_else_is_in_the_batch(tiny_tokenizer, convention):
    """In fp32: every prompt alone equals the prompt among strangers, for 40 random schedules a convention."""
    engine = open_engine(diffusion_lm(tiny_tokenizer, convention, torch.float32))
    rng = random.Random(2)
    pool = [Request(some_prompt(rng), some_settings(rng)) for _ in range(40)]
    alone = [engine.generate(request).token_ids for request in pool]
    for _ in range(40):
        chosen = rng.sample(range(len(pool)), rng.randint(2, 10))
        engine.scheduler.slots = rng.randint(2, 8)
        arrivals = {}  # who comes before which step
        for index in chosen:
            arrivals.setdefault(rng.randint(0, 12), []).append(index)
        running = {}
        for step in range(10_000):
            for index in arrivals.pop(step, []):
                running[index] = engine.submit(pool[index])
            if engine.scheduler.is_idle and not arrivals:
                break
            engine._step()
            if rng.random() < 0.02 and running:  # somebody hangs up
                engine.cancel(running.pop(rng.choice(list(running))))
        for index, sequence in running.items():
            assert sequence.finish_reason is not None
            assert sequence.stream.token_ids == alone[index]
            engine.cancel(sequence)


def test_more_rows_than_slots_wait_and_a_row_that_ends_frees_its_slot_at_once(lm):
    engine = open_engine(lm, slots=2)
    short, long = make(max_new_tokens=1, tau_edit=None, tau_mask=0.0), make(max_new_tokens=40)
    sequences = [engine.submit(Request([5, 6], settings)) for settings in (long, short, short, short)]
    scheduler, seen = engine.scheduler, []
    while not scheduler.is_idle:
        assert len(scheduler.running) <= 2
        engine._step()
        seen.append([sequence.finish_reason for sequence in sequences])
    assert seen[0] == [None, "length", None, None]
    assert seen[1] == [None, "length", "length", None]
    assert seen[2] == [None, "length", "length", "length"]
    assert [sequence.forwards for sequence in sequences[1:]] == [1, 1, 1]


def test_events_come_in_order_and_batch_callbacks_hear_everything(lm):
    engine = open_engine(lm)
    requests = [Request([5] * n, make(edit_blocks=n % 2)) for n in (1, 6, 11)]
    heard = {0: [], 1: [], 2: []}
    done = engine.generate_batch(requests, lambda index, event: heard[index].append(event))
    for index, request in enumerate(requests):
        events = list(engine.stream(request))
        assert [type(event) for event in heard[index]] == [type(event) for event in events]
        assert isinstance(events[-1], Completion)
        assert heard[index][-1] is done[index]
        steps = [event for event in events if isinstance(event, Step)]
        assert done[index].stats.forwards == len(steps)
        assert done[index].stats.drafts == sum(len(step.drafted) for step in steps)
        assert done[index].stats.mask_ratio == [step.mask_ratio for step in steps]
        finished = [event for event in events if isinstance(event, Finished)]
        assert [token for event in finished for token in event.new_tokens] == done[index].token_ids
        assert "".join(event.text for event in finished) == done[index].text


def test_a_stream_that_is_left_frees_its_slot(lm):
    engine = open_engine(lm, slots=1)
    stream = engine.stream(Request([5, 6], make(max_new_tokens=40)))
    next(stream)
    stream.close()
    assert engine.scheduler.is_idle
    assert not engine.listeners
    assert engine.generate(Request([5, 6], make())).token_ids


def test_the_seed_decides_and_batch_mates_do_not(lm):
    engine = open_engine(lm)
    warm = make(temperature=1.5, max_new_tokens=16)
    texts = [engine.generate(Request([9, 8, 7], warm._replace(seed=seed))).token_ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    batch = engine.generate_batch([Request([9, 8, 7], warm._replace(seed=seed)) for seed in (2, 1, 3)])
    assert [done.token_ids for done in batch[:2]] == [texts[2], texts[0]]


def test_out_of_memory_shrinks_the_batch_once_says_so_and_loses_no_request(lm, capsys):
    rng = random.Random(3)
    requests = [Request(some_prompt(rng), make(max_new_tokens=20)) for _ in range(9)]
    expected = [done.token_ids for done in open_engine(lm).generate_batch(requests)]
    engine = open_engine(lm, slots=6)
    engine.scheduler.runtime = starved = Starved(engine.runtime, {14})
    assert [done.token_ids for done in engine.generate_batch(requests)] == expected
    assert starved.allocated == [6, 3]
    assert engine.slots == 3
    assert capsys.readouterr().err.count("out of memory with 6 slots: continuing with 3") == 1
    engine.scheduler.runtime = Starved(engine.runtime, {3})
    with pytest.raises(ModelError, match=r"out of memory with 3 slots of 64 tokens: lower engine.slots"):
        engine.generate_batch(requests)


POISON = 300  # a padding row of the vocabulary, which no answer contains; its embedding is NaN in `poisoned`


@pytest.fixture
def poisoned(tiny_tokenizer, monkeypatch):
    # A request may not name a padding row.
    monkeypatch.setattr("hildanext.decoding.engines.transformers.check_ids", lambda *given: None)
    lm = diffusion_lm(tiny_tokenizer, "shifted", torch.float32, vocab_size=POISON + 1)
    assert len(tiny_tokenizer) <= POISON
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[POISON] = torch.nan
    return lm


def outcomes(engine, requests):
    """What each request ended with, a Completion or an error, all of them side by side."""
    handles = {engine.submit(request): index for index, request in enumerate(requests)}
    found = {}
    while len(found) < len(requests):
        for handle, event in engine.step():
            if not isinstance(event, (Step, Finished)):
                assert handles[handle] not in found
                found[handles[handle]] = event
    return [found[index] for index in range(len(requests))]


def check_that_a_request_fails_alone(engine, alone):
    """`alone(request)`: the tokens of a request on an engine that has answered no other."""
    good = [Request([9 + i] * (5 + 9 * i), make(max_new_tokens=10, temperature=i / 2)) for i in range(3)]
    bad = Request([5, 6, POISON, 8] * 6, make())
    found = outcomes(engine, [good[0], bad, good[1], bad, good[2]])
    for index in (1, 3):
        assert isinstance(found[index], NonFiniteLogitsError)
        assert "logits are NaN or infinite" in str(found[index])
    assert [found[index].token_ids for index in (0, 2, 4)] == [alone(request) for request in good]
    # Beside longer neighbours, a short text reads all of its slot, which a failed request may have had before.
    again = outcomes(engine, [*good, *good])
    assert [done.token_ids for done in again] == [alone(request) for request in good] * 2
    with pytest.raises(NonFiniteLogitsError):
        engine.generate(bad)
    with pytest.raises(NonFiniteLogitsError):
        engine.generate_batch([good[0], bad])
    assert engine.scheduler.is_idle
    assert not engine.listeners
    assert engine.generate(good[1]).token_ids == alone(good[1])


def test_a_request_with_nan_logits_fails_alone(poisoned):
    check_that_a_request_fails_alone(
        open_engine(poisoned, slots=5), lambda request: open_engine(poisoned).generate(request).token_ids
    )


def test_the_seed_is_told_where_it_decides_the_text(lm):
    engine = open_engine(lm)
    warm = make(temperature=1.5, seed=5)
    assert engine.generate(Request([9, 8, 7], warm)).stats.seed == 5
    assert engine.generate(Request([9, 8, 7], warm._replace(temperature=0.0))).stats.seed is None


def test_other_errors_are_not_taken_for_lack_of_memory(lm, monkeypatch):
    engine = open_engine(lm)
    monkeypatch.setattr(engine.runtime, "head", lambda hidden: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.generate(Request([5], make()))


def test_requests_that_cannot_be_served_are_refused_before_any_runs(lm):
    engine = open_engine(lm)
    good = Request([5, 6], make())
    with pytest.raises(UsageError, match=r"60 tokens.*max_new_tokens \(12\).*context of 64"):
        engine.generate_batch([good, Request([5] * 60, make())])
    with pytest.raises(UsageError, match="contains the mask token"):
        engine.generate(Request([5, MASK], make()))
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.generate(Request([], make()))
    assert engine.scheduler.is_idle
    assert not engine.listeners
