"""The threshold-edit rule against LLaDA2.1 eq. 1-3 as set arithmetic; proposals against transformers' own processors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from hildanext.config import DecodeConfig, changed_settings, parse_config
from hildanext.config.decoding import BROUGHT_BY_MODE
from hildanext.decoding.rule import counts_before, decodable_scores, edit_step, indel_step, keep_likely, propose
from hildanext.decoding.settings import Preset, Settings, check_request, read_presets, resolve
from hildanext.diffusion.edits import EditTokens
from hildanext.errors import ConfigError, ModelError, UsageError

MASK = 9


def rule(tokens, ids, confidence, editable, settled, tau_mask, tau_edit):
    """Eq. 1-3 as set arithmetic on tensors; the settled position is drafted at once."""
    masked = tokens == MASK
    gamma = masked & ((confidence > tau_mask) | settled)
    if masked.any() and not gamma.any():
        gamma[torch.where(masked, confidence, -1.0).argmax()] = True
    delta = (
        torch.zeros_like(masked) if tau_edit is None else ~masked & editable & (ids != tokens) & (confidence > tau_edit)
    )
    return (
        torch.where(gamma | delta, ids, tokens).tolist(),
        gamma.nonzero()[:, 0].tolist(),
        delta.nonzero()[:, 0].tolist(),
    )


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(0, 32), st.booleans()), min_size=1, max_size=12
    ),
    tau_mask=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    tau_edit=st.sampled_from([None, 0.0, 0.5, 1.0]),
    settled=st.none() | st.integers(0, 11),
)
@settings(max_examples=300, deadline=None)
def test_edit_step_is_the_rule(rows, tau_mask, tau_edit, settled):
    tokens, ids, parts, editable = (list(column) for column in zip(*rows, strict=True))
    confidence = [part / 32 for part in parts]  # exact in float32
    found = edit_step(
        tokens,
        ids,
        confidence,
        editable,
        mask_token_id=MASK,
        tau_mask=tau_mask,
        tau_edit=tau_edit,
        settled=settled,
    )
    is_settled = torch.arange(len(rows)) == (-1 if settled is None else settled)
    columns = (torch.tensor(column) for column in (tokens, ids, confidence, editable))
    assert found == rule(*columns, is_settled, tau_mask, tau_edit)


def test_propose_never_gives_the_mask_token_or_a_padding_row():
    logits = torch.tensor([[0.0, 1.0, 9.0, 3.0, 99.0], [0.0, 5.0, 9.0, 1.0, 0.0]])
    ids, confidence = propose(logits, mask_token_id=2, vocab_size=4)
    assert ids.tolist() == [3, 1]
    kept = logits[:, [0, 1, 3]].softmax(-1)
    assert confidence.tolist() == pytest.approx([kept[0, 2].item(), kept[1, 1].item()])


def make(**changes):
    return Settings("Q_MODE", 0.7, 0.5, 4, 4, 8, 0.0, 0)._replace(**changes)


def gumbel(n, size, seed=0):
    return -torch.empty(n, size).exponential_(generator=torch.Generator().manual_seed(seed)).log()


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({}, [0, 1, 2]),
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 9}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 2]),
        ({"top_p": 0.01}, [0]),
    ],
)
def test_propose_draws_from_the_softmax_of_what_is_allowed(changes, allowed):
    logits = torch.tensor([[1.0, 0.0, 0.5, 99.0]]).expand(40_000, 4)
    settings = make(temperature=0.7, **changes)
    ids, confidence = propose(logits, mask_token_id=3, vocab_size=4, settings=settings, noise=gumbel(40_000, 4))
    warm = (logits[0, allowed] / 0.7).softmax(-1)
    rates = torch.bincount(ids, minlength=4).float() / 40_000
    assert rates[allowed].tolist() == pytest.approx(warm.tolist(), abs=0.01)
    assert rates.sum() == pytest.approx(rates[allowed].sum())
    # The confidence is the model's, whatever the temperature: thresholds keep their meaning.
    assert torch.allclose(confidence, logits[0, :3].softmax(-1)[ids])


def test_the_same_noise_draws_the_same_token_and_no_temperature_is_the_argmax():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    noise = gumbel(50, 12)
    how = {"mask_token_id": 11, "vocab_size": 12, "noise": noise}
    one, _ = propose(logits, settings=make(temperature=1.0), **how)
    nearly, _ = propose(logits + 1e-6, settings=make(temperature=1.0), **how)
    assert torch.equal(one, nearly)
    cold, _ = propose(logits, settings=make(temperature=1e-4), **how)
    greedy, _ = propose(logits, mask_token_id=11, vocab_size=12)
    assert torch.equal(cold, greedy)
    assert not torch.equal(one, greedy)


@given(
    scores=st.lists(st.integers(-30, 30), min_size=2, max_size=8),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_the_filters_are_those_of_transformers(scores, top_k, top_p, min_p):
    row = torch.tensor([scores]).float() / 7
    expected = row.clone()
    if min_p > 0:
        expected = MinPLogitsWarper(min_p)(None, expected)
    if top_k is not None:
        expected = TopKLogitsWarper(min(top_k, len(scores)))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    kept = keep_likely(row, make(top_k=top_k, top_p=top_p, min_p=min_p)).isfinite()[0]
    # Ties at the border may fall either way: the same number of tokens, with the same scores.
    assert sorted(row[0, kept].tolist()) == sorted(row[0, expected.isfinite()[0]].tolist())


def test_the_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(1, 10, dtype=torch.bool)
    seen[0, [1, 4, 7]] = True
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 4, 7]]), logits.clone())
    expected[:, 9] = -torch.inf
    ids, confidence = propose(logits, mask_token_id=9, vocab_size=10, settings=make(repetition_penalty=1.7), seen=seen)
    assert ids.tolist() == expected.argmax(-1).tolist()
    assert confidence.item() == pytest.approx(expected.softmax(-1).max().item())


@given(
    logits=st.lists(st.integers(-40, 40), min_size=6, max_size=6),
    text=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    presence=st.sampled_from([-2.0, 0.0, 0.5]),
    frequency=st.sampled_from([-0.5, 0.0, 2.0]),
    bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-100.0, -1.5, 2.0, 100.0])),
    start=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_scores_are_openais_formula(logits, text, presence, frequency, bias, start):
    """mu[j] -> mu[j] + bias[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, at every position of a text."""
    changes = {"presence_penalty": presence, "frequency_penalty": frequency, "logit_bias": tuple(bias.items())}
    positions = list(range(len(text) + 1))
    rows = torch.tensor([logits]).float().div(8).expand(len(positions), 6)
    counts = counts_before(text, start, positions, 6)
    found = decodable_scores(rows, 5, 6, make(**changes), counts=counts)
    for position in positions:
        new = text[start:position]
        for j in range(5):
            expected = logits[j] / 8 + bias.get(j, 0.0) - new.count(j) * frequency - (presence if j in new else 0.0)
            assert found[position, j].item() == pytest.approx(expected, abs=1e-5)
    assert (found[:, 5] == -torch.inf).all()  # no bias makes the mask token possible


LARGEST = torch.finfo(torch.float32).max
EXTREME = [0.0, 1.0, -1.0, 30.0, -30.0, 65504.0, 1e-40, LARGEST, -LARGEST, LARGEST / 2, -torch.inf]


@st.composite
def any_request(draw):
    """(logits [1, 6], settings, noise, seen and counts) of anything a request may ask for; 5 is the mask token."""
    logits = torch.tensor([draw(st.lists(st.sampled_from(EXTREME), min_size=6, max_size=6))])
    decode = DecodeConfig(
        temperature=draw(st.sampled_from([0.0, 1e-40, 1e-5, 0.7, 2.0])),
        top_k=draw(st.none() | st.integers(1, 7)),
        top_p=draw(st.sampled_from([1e-40, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([0.1, 1.0, 1.2, 2.0])),
        presence_penalty=draw(st.sampled_from([-2.0, 0.0, 2.0])),
        min_p=draw(st.sampled_from([0.0, 0.2, 1.0])),
        logit_bias=draw(st.sampled_from([{}, {"5": 100.0}, {"0": -100.0, "5": 1.0}])),
    )
    wanted, bits = resolve(decode, 4), draw(st.integers(0, 63))
    noise = gumbel(1, 6, bits) if wanted.temperature else None
    seen = torch.tensor([[bool(bits >> i & 1) for i in range(6)]])
    counts = torch.tensor([[float(bits * (i + 1) % 4) for i in range(6)]]) if wanted.counts_tokens else None
    return logits, wanted, noise, {"seen": seen if wanted.repetition_penalty != 1 else None, "counts": counts}


@given(any_request())
@settings(max_examples=200, deadline=None)
def test_no_request_makes_the_mask_token_possible(made):
    logits, wanted, noise, before = made
    ids, confidence = propose(logits, mask_token_id=5, vocab_size=6, settings=wanted, noise=noise, **before)
    possible = logits[:, :5].isfinite().any(-1)
    assert (ids[possible] != 5).all()
    assert logits.gather(1, ids[:, None])[possible, 0].isfinite().all()  # nor what the model excludes
    assert ((confidence >= 0) & (confidence <= 1))[possible].all()
    assert confidence[~possible].isnan().all()


@given(any_request(), st.sampled_from([torch.nan, torch.inf]), st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_damaged_logits_have_no_confidence(made, damage, where):
    logits, wanted, noise, before = made
    logits[0, where] = damage
    _, confidence = propose(logits, mask_token_id=5, vocab_size=6, settings=wanted, noise=noise, **before)
    assert confidence[0].isnan()


def test_the_coldest_temperature_takes_the_most_likely_token():
    logits = torch.tensor([[1.0, 1.5, 0.0], [-3.0, -2.0, 9.0]])
    for temperature in (1e-300, 1e-40, 1e-5):
        ids, _ = propose(
            logits, mask_token_id=2, vocab_size=3, settings=make(temperature=temperature), noise=gumbel(2, 3)
        )
        assert ids.tolist() == [1, 1]


def test_a_request_without_a_seed_draws_a_new_one_each_time():
    warm = DecodeConfig(temperature=1.0)
    seeds = [resolve(warm, 4).seed for _ in range(20)]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert resolve(DecodeConfig(temperature=1.0, seed=7), 4).used_seed == 7
    greedy = resolve(DecodeConfig(), 4)
    assert (greedy, greedy.used_seed) == (resolve(DecodeConfig(), 4), None)


def test_a_mode_brings_all_its_values_but_the_given_ones():
    for changes, expected in [
        ({"mode": "S_MODE"}, ("preset",) * 6),
        ({"mode": "S_MODE", "tau_edit": None, "edit_blocks": 1}, ("preset", None, "preset", 1, "preset", "preset")),
        ({"temperature": 0.5}, (0.9, 0.1, 3, 2, 0.3, 12)),
    ]:
        before = {"tau_mask": 0.9, "tau_edit": 0.1, "max_post_steps": 3, "edit_blocks": 2, "block_size": 16}
        before |= {"tau_accept": 0.3, "rows": 12}
        after = before | changed_settings(changes)
        assert tuple(after[name] for name in BROUGHT_BY_MODE) == expected
        assert after["block_size"] == 16
    assert set(BROUGHT_BY_MODE) == {*Preset._fields} - {"block_size"}


def test_presets_and_overrides():
    assert resolve(DecodeConfig(mode="S_MODE"), 8)[:3] == ("S_MODE", 0.5, 0.0)
    assert resolve(DecodeConfig(mode="Q_MODE"), 8)[:3] == ("Q_MODE", 0.7, 0.5)
    off = resolve(DecodeConfig(mode="S_MODE", tau_edit=None, tau_mask=0.9, block_size=16), 8)
    assert (off.tau_mask, off.tau_edit, off.block_size) == (0.9, None, 16)


def test_a_calibrated_mode_stands_between_the_checkpoint_and_the_request():
    stored = {"tau_mask": 0.3, "tau_edit": None, "max_post_steps": 2, "block_size": 4}
    assert read_presets({"S_MODE": stored}) == {"S_MODE": Preset(0.3, None, 2, 4, 0)}
    modes = read_presets({"S_MODE": stored | {"edit_blocks": 2}})
    calibrated = resolve(DecodeConfig(mode="S_MODE"), 8, modes)
    stored |= {"edit_blocks": 2, "tau_accept": None, "rows": 8}
    assert {name: calibrated._asdict()[name] for name in Preset._fields} == stored
    changes = {"tau_edit": 0.9, "max_post_steps": 0, "block_size": 16, "edit_blocks": 0}
    asked = resolve(DecodeConfig(mode="S_MODE", **changes), 8, modes)
    expected = {"tau_mask": 0.3, "tau_accept": None, "rows": 8, **changes}
    assert {name: asked._asdict()[name] for name in Preset._fields} == expected
    assert resolve(DecodeConfig(mode="Q_MODE"), 8, modes) == resolve(DecodeConfig(mode="Q_MODE"), 8)
    with pytest.raises(ModelError, match=r"'hilda' has invalid modes: .*speed"):
        read_presets({"S_MODE": {"speed": 1}})
    for damage in ({"max_post_steps": 10**9}, {"tau_mask": math.nan}, {"edit_blocks": 65}, {"tau_edit": "often"}):
        with pytest.raises(ModelError, match=rf"'hilda' has invalid modes: '{next(iter(damage))}'"):
            read_presets({"S_MODE": stored | damage})


def test_impossible_settings_name_their_key(subtests: pytest.Subtests):
    for changes in [
        {"tau_mask": 1.5},
        {"tau_edit": -0.1},
        {"block_size": 0},
        {"max_new_tokens": 0},
        {"max_post_steps": 257},
        {"temperature": -1},
        {"temperature": 2.1},
        {"temperature": 1e39},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 2.1},
        {"edit_blocks": -1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"min_p": 1.1},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"one": 1}},
        {"logprobs": 21},
        {"seed": 2**63},
        {"stop": [""]},
    ]:
        with subtests.test(changes=changes):
            with pytest.raises(ConfigError, match=next(iter(changes))):
                parse_config({"decode": changes})


def test_a_request_must_fit():
    with pytest.raises(UsageError, match="empty"):
        check_request([], make(), 100)
    with pytest.raises(UsageError, match=r"90 tokens.*max_new_tokens \(9\).*context of 99"):
        check_request([1] * 90, make(max_new_tokens=9), 99)  # 99 tokens, but 100 in whole blocks
    check_request([1] * 90, make(max_new_tokens=9), 100)


def test_a_state_that_was_there_before_takes_a_second_choice():
    """Blocks of four, x = a b c d; every pass would delete b and insert before d."""
    edit_tokens = EditTokens(MASK, 7, 8)

    def step(second=None, behind=(), **changes):
        given = ([1, 2, 3, 4], [1, 7, 3, 8], [0.9, 0.8, 0.9, 0.7], [True] * 4, edit_tokens)
        thresholds = {"tau_mask": 0.5, "tau_edit": 0.5} | changes
        return indel_step(*given, mask_token_id=MASK, block_size=4, second=second, behind=behind, **thresholds)

    assert step()[:6] == ([1, 3, MASK, 4], [], [], [2], [(1, 2)], [0, 2, None, 3])
    assert step(min_indel_confidence=0.75).tokens == [1, 3, 4, MASK]  # DELETE alone
    assert step(min_indel_confidence=0.75, behind=[5, 6])[0] == [1, 3, 4, 5]
    assert step(min_indel_confidence=0.75, behind=[5, 6]).rest == [6]
    assert step(min_indel_confidence=0.8).tokens == [1, 2, 3, 4]
    again = step(second=[6, 6, 6, 6])  # INSERT is the least confident change
    assert (again.tokens, again.edited, again.deleted) == ([1, 3, 6, MASK], [2], [(1, 2)])
    assert step(second=[6, 6, 6, 4]).tokens == [1, 3, 4, MASK]  # its second choice is to stay
