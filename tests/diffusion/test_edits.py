"""Insertions and deletions against a brute-force search over all scripts, and by their properties."""

from __future__ import annotations

import difflib
import statistics
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.diffusion.edits import RUN_ON, EditTokens, align, apply_edits, edit_labels, edit_noise, segments
from hildanext.diffusion.noise import Noisy, block_ids

MASK, DELETE, INSERT = 90, 91, 92
TOKENS = EditTokens(MASK, DELETE, INSERT)
letters = st.integers(0, 4)


@cache
def shapes(n: int, m: int) -> list[tuple[str, ...]]:
    """Every way through n draft and m target tokens: p takes one of each, d a draft token, i a target token."""
    if n == m == 0:
        return [()]
    found = [("p", *rest) for rest in shapes(n - 1, m - 1)] if n and m else []
    found += [("d", *rest) for rest in shapes(n - 1, m)] if n else []
    return found + ([("i", *rest) for rest in shapes(n, m - 1)] if m else [])


def worth(shape: tuple[str, ...], x: list[int], y: list[int]) -> tuple[int, int, int]:
    """Matches, pairs, equal tokens of a script."""
    i = j = matches = pairs = equal = 0
    for step in shape:
        if step == "p":
            matches += x[i] in (y[j], MASK)
            pairs += 1
            equal += x[i] == y[j]
        i, j = i + (step != "i"), j + (step != "d")
    return matches, pairs, equal


@given(st.lists(st.one_of(letters, st.just(MASK)), max_size=6), st.lists(letters, max_size=6))
@settings(max_examples=60, deadline=None)
def test_align_finds_what_a_search_over_all_scripts_finds(x, y):
    shape = tuple("i" if i is None else "d" if j is None else "p" for i, j in align(x, y, MASK))
    best = max(worth(other, x, y) for other in shapes(len(x), len(y)))
    assert worth(shape, x, y) == best
    # Of the best scripts, the first in the order pair, deletion, insertion.
    order = str.maketrans("pdi", "012")
    assert shape == min(
        (s for s in shapes(len(x), len(y)) if worth(s, x, y) == best), key=lambda s: "".join(s).translate(order)
    )


@given(st.lists(letters, max_size=30), st.lists(letters, max_size=30))
@settings(max_examples=60, deadline=None)
def test_the_matches_without_masks_are_a_longest_common_subsequence(x, y):
    lengths = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
    matches = sum(x[i] == y[j] for i, j in align(x, y, MASK) if i is not None and j is not None)
    assert (
        matches
        == lengths[-1][-1]
        >= sum(b.size for b in difflib.SequenceMatcher(None, x, y, False).get_matching_blocks())
    )


@st.composite
def draft_and_target(draw):
    size = draw(st.integers(1, 16))
    symbols = st.integers(0, draw(st.integers(0, 15)))
    token = st.one_of(symbols, st.just(MASK)) if draw(st.booleans()) else symbols
    lists = (st.lists(s, min_size=size, max_size=size) for s in (token, symbols))
    return tuple(draw(s) for s in lists)


@given(draft_and_target())
@settings(max_examples=300, deadline=None)
def test_labels_applied_round_after_round_give_the_target(pair):
    x, y = pair
    for _ in range(len(y) + 1):  # one mask in each gap and round, and a round to fill the last
        if x == y:
            break
        labels = edit_labels(x, y, TOKENS)
        edited = apply_edits(x, labels, TOKENS)
        assert len(edited.tokens) == len(labels) == len(x)
        assert not {DELETE, INSERT} & set(edited.tokens)
        assert {label for token, label in zip(x, labels, strict=True) if token == MASK} <= {*y, DELETE}
        x = edited.tokens
    assert x == y
    assert edit_labels(y, y, TOKENS) == y


def test_labels_of_known_drafts(subtests):
    cases = [  # draft, target, labels; _ is a mask, - DELETE, + INSERT
        ("abcd", "abcd", "abcd"),
        ("axcd", "abcd", "abcd"),
        ("aabc", "abcd", "a-bc"),  # a doubled token: the second goes; d comes as a mask
        ("acde", "abcd", "a+de"),  # a missing token; the insertion pushes e out
        ("ad__", "abcd", "abcd"),  # masks behind it: replaced, since a mask fits any token
        ("abef", "abcd", "abcd"),
        ("adef", "abcd", "a+ef"),  # two missing tokens: one mask a round
        ("a_b_", "abcd", "abcd"),
        ("a_bc", "abcd", "a-bc"),  # a mask too many
        ("xyzw", "abcd", "abcd"),  # nothing matches
    ]
    ids = {"_": MASK, "-": DELETE, "+": INSERT}
    for draft, target, labels in cases:
        with subtests.test(draft=draft):
            x, y, wanted = ([ids.get(c, ord(c)) for c in text] for text in (draft, target, labels))
            assert edit_labels(x, y, TOKENS) == wanted


@given(draft_and_target(), st.lists(letters, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_apply_edits_moves_tokens_as_it_says(pair, behind, data):
    x, _ = pair
    labels = [data.draw(st.sampled_from([token, 7, DELETE, INSERT])) for token in x]
    edited = apply_edits(x, labels, TOKENS, behind)
    assert len(edited.tokens) == len(x)
    whole = edited.tokens + edited.rest
    for token, label, place in zip(x, labels, edited.places, strict=True):
        if label == DELETE:
            assert place is None
        else:
            assert whole[place] == (token if label == INSERT else label)
            assert label != INSERT or whole[place - 1] == MASK
    length = len(x) - labels.count(DELETE) + labels.count(INSERT)
    assert whole[length : length + len(behind)] == behind
    assert set(whole[length + len(behind) :]) <= {MASK}


def edited_row(ids, allowed, docs, positions, block_size, deletion, insertion, seed=0, pinned=None, masked=None):
    ids, allowed, docs, positions = (torch.tensor(v) for v in (ids, allowed, docs, positions))
    masked = torch.zeros_like(allowed) if masked is None else torch.tensor(masked)
    noisy = Noisy(ids.masked_fill(masked, MASK), masked, torch.zeros_like(allowed), torch.ones(len(ids)), ids)
    pinned = torch.zeros_like(allowed) if pinned is None else torch.tensor(pinned)
    return edit_noise(
        ids,
        allowed,
        docs,
        block_ids(positions, block_size),
        pinned,
        noisy,
        tokens=TOKENS,
        ordinary_ids=torch.arange(60),
        deletion_rate=deletion,
        insertion_rate=insertion,
        corrupt_rate=0.0,
        generator=torch.Generator().manual_seed(seed),
    )


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_noise_stays_within_its_block_and_its_labels_lead_back(data):
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    n, block_size = sum(sizes), data.draw(st.integers(1, 9))
    docs = [d for d, size in enumerate(sizes) for _ in range(size)]
    positions = [p for size in sizes for p in range(size)]
    ids, flags = (
        data.draw(st.lists(st.integers(0, 50), min_size=n, max_size=n)),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
    allowed, masked = data.draw(flags), [a and m for a, m in zip(data.draw(flags), data.draw(flags), strict=True)]
    masked = [a and m for a, m in zip(allowed, masked, strict=True)]
    pinned = [a and p % block_size == 0 for a, p in zip(allowed, positions, strict=True)]
    noisy = edited_row(
        ids, allowed, docs, positions, block_size, 0.3, 0.3, data.draw(st.integers(0, 99)), pinned, masked
    )
    x, labels = noisy.noisy_ids.tolist(), noisy.labels.tolist()
    for i in range(n):
        if not allowed[i]:
            assert x[i] == labels[i] == ids[i]
            assert not noisy.masked[i] | noisy.corrupted[i]
        if pinned[i]:
            assert labels[i] == ids[i]
    assert not {DELETE, INSERT} & set(x)
    assert noisy.masked.tolist() == [token == MASK for token in x]
    assert noisy.corrupted.tolist() == [t not in (MASK, label) for t, label in zip(x, labels, strict=True)]
    for start, end, _ in segments(
        torch.tensor(allowed), torch.tensor(docs), block_ids(torch.tensor(positions), block_size)
    ):
        assert len({(docs[i], positions[i] // block_size) for i in range(start, end)}) == 1
        start += pinned[start]
        draft, target = x[start:end], ids[start:end]
        assert labels[start:end] == edit_labels(draft, target, TOKENS)


def test_segments_are_those_a_loop_finds():
    allowed = [False, True, True, True, True, True, True, True]
    docs, positions = [0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 0, 1, 2]
    found = segments(torch.tensor(allowed), torch.tensor(docs), block_ids(torch.tensor(positions), 2))
    assert found == [(1, 2, 5), (2, 4, 5), (4, 5, 5), (5, 7, 8), (7, 8, 8)]


def test_a_dropped_token_pulls_in_what_follows_and_the_rates_are_kept():
    n = 600
    row = {"ids": [i % 50 for i in range(n)], "allowed": [True] * n, "docs": [0] * n, "positions": list(range(n))}
    seeds = range(20)
    dropped = [edited_row(**row, block_size=n, deletion=0.2, insertion=0.0, seed=s) for s in range(30)]
    share = 0.2 / (1 - 0.8 * RUN_ON)  # a token is dropped if a run begins at it, or if it does not but one goes on
    assert statistics.mean(int(one.masked.sum()) / n for one in dropped) == pytest.approx(share, rel=0.05)
    added = torch.stack([edited_row(**row, block_size=4, deletion=0.0, insertion=0.1, seed=s).noisy_ids for s in seeds])
    whole = (added == torch.tensor(row["ids"])).view(-1, 4).all(1).float().mean()
    # Nothing was added before any of the four tokens.
    assert whole == pytest.approx(0.9**4, rel=0.05)
    assert edited_row(**row, block_size=4, deletion=0.0, insertion=0.0).labels.tolist() == row["ids"]
    rows = [edited_row(**row, block_size=50, deletion=0.0, insertion=0.02, seed=s).noisy_ids for s in range(100)]
    doubled = [0, 0, 0]  # runs of one, two and three tokens that stand twice
    for ids in (one.tolist() for one in rows):
        for i in range(n):
            size = next((k for k in (1, 2, 3) if ids[i : i + k] == ids[i + k : i + 2 * k] != []), 0)
            doubled[size - 1] += size > 0 and ids[i - 1 : i] != ids[i + size - 1 : i + size]
    assert doubled[0] > 300
    assert doubled[1] / doubled[0] == pytest.approx(RUN_ON, rel=0.3)
    assert doubled[2] / doubled[0] == pytest.approx(RUN_ON**2, rel=0.5)
    gone = edited_row([1, 2, 3, 4, 5, 6], [True] * 6, [0] * 6, list(range(6)), 3, 1.0, 0.0)
    assert gone.noisy_ids.tolist() == [MASK] * 6
