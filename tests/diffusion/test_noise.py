"""Noise against its definition: probabilities, disjointness, purity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.diffusion.noise import add_noise, block_ids, complement, noise_levels, sample_generator, wrong_tokens

MASK = 99


def noisy_of(length: int, rate: float, corrupt: float, seed: int, ordinary: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 50, (length,), generator=generator)
    allowed = torch.rand(length, generator=generator) < 0.8
    ordinary = torch.arange(10, 50) if ordinary is None else ordinary
    noisy = add_noise(
        ids,
        allowed,
        torch.full((length,), rate),
        mask_token_id=MASK,
        ordinary_ids=ordinary,
        corrupt_rate=corrupt,
        generator=sample_generator(seed, 0),
    )
    return ids, allowed, noisy


@given(length=st.integers(1, 80), rate=st.floats(0, 1), corrupt=st.floats(0, 0.99), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_masked_and_corrupted_are_what_they_say(length, rate, corrupt, seed):
    ids, allowed, noisy = noisy_of(length, rate, corrupt, seed)
    assert not (noisy.masked & noisy.corrupted).any()
    assert not ((noisy.masked | noisy.corrupted) & ~allowed).any()
    assert (noisy.noisy_ids[noisy.masked] == MASK).all()
    assert (noisy.noisy_ids[noisy.corrupted] != ids[noisy.corrupted]).all()
    assert set(noisy.noisy_ids[noisy.corrupted].tolist()) <= set(range(10, 50))
    untouched = ~(noisy.masked | noisy.corrupted)
    assert (noisy.noisy_ids[untouched] == ids[untouched]).all()


def test_rates_are_the_asked_ones():
    _, allowed, noisy = noisy_of(200_000, 0.3, 0.2, 7)
    n = allowed.sum()
    assert noisy.masked.sum() / n == pytest.approx(0.3, abs=0.005)
    assert noisy.corrupted.sum() / (n * 0.7) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("clean", [10, 13, 25])  # 25 is no ordinary token: every ordinary one may replace it
def test_wrong_tokens_are_uniform_over_the_others(clean):
    ordinary = torch.tensor([10, 11, 13, 20])
    drawn = wrong_tokens(torch.full((40_000,), clean), ordinary, torch.Generator().manual_seed(0))
    expected = [i for i in ordinary.tolist() if i != clean]
    counts = torch.bincount(drawn, minlength=30)
    assert counts.nonzero()[:, 0].tolist() == expected
    assert counts[expected].float().div(40_000).tolist() == pytest.approx([1 / len(expected)] * len(expected), abs=0.01)


def test_levels_are_constant_in_a_block_of_a_document_and_differ_between_blocks():
    doc_ids = torch.tensor([0] * 7 + [1] * 6 + [-1] * 3)
    position_ids = torch.tensor([*range(7), *range(6), *range(3)])
    block = block_ids(position_ids, 4)
    t = noise_levels(doc_ids, block, 0.2, 0.9, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    levels = {}
    for doc, b, level in zip(doc_ids.tolist(), block.tolist(), t.tolist(), strict=True):
        assert levels.setdefault((doc, b), level) == level
    assert len(set(levels.values())) == len(levels) == 5
    assert all(0.2 <= level <= 0.9 for level in levels.values())


def test_levels_are_uniform():
    n = 20_000
    t = noise_levels(torch.arange(n), torch.zeros(n, dtype=torch.long), 0.1, 0.5, torch.Generator().manual_seed(1))
    quantiles = torch.quantile(t, torch.tensor([0.25, 0.5, 0.75])).tolist()
    assert quantiles == pytest.approx([0.2, 0.3, 0.4], abs=0.01)


def test_a_sample_has_its_own_noise_whatever_surrounds_it():
    one = torch.rand(5, generator=sample_generator(3, 17))
    assert torch.equal(one, torch.rand(5, generator=sample_generator(3, 17)))
    others = [sample_generator(4, 17), sample_generator(3, 18), sample_generator(3, 17, "draft")]
    assert all(not torch.equal(one, torch.rand(5, generator=other)) for other in others)


@given(seed=st.integers(0, 1000), rate=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_complementary_pair_masks_every_allowed_token_exactly_once(seed, rate):
    ids, allowed, noisy = noisy_of(40, rate, 0.3, seed)
    inverse = complement(ids, allowed, noisy, MASK, 0.05)
    assert torch.equal(noisy.masked.int() + inverse.masked.int(), allowed.int())
    assert (inverse.noisy_ids[~inverse.masked] == ids[~inverse.masked]).all()
