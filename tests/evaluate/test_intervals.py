"""Intervals and pass@k against formulas, other libraries and enumeration."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hildanext.evaluate.intervals import Z, mean, pass_at_k, ratio, share


@given(n=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_share_of_lucky_draws(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    passed = [i < right for i in range(n)]
    draws = [any(passed[i] for i in some) for some in combinations(range(n), k)]
    assert pass_at_k(n, right, k) == pytest.approx(sum(draws) / len(draws))


@given(n=st.integers(1, 200), data=st.data())
def test_wilsons_bounds_solve_his_equation(n: int, data: st.DataObject) -> None:
    """Both ends are where the observed share is just Z standard errors away."""
    hits = data.draw(st.integers(0, n))
    found = share([True] * hits + [False] * (n - hits))
    assert found.value == hits / n
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        if 0 < end < 1:
            assert abs(found.value - end) == pytest.approx(Z * (end * (1 - end) / n) ** 0.5, rel=1e-6, abs=1e-9)


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400).tolist()
    found = mean(values, 4000, seed=1)
    error = float(np.std(values, ddof=1)) / 400**0.5
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(np.mean(values))
    assert found.high - found.low == pytest.approx(2 * Z * error, rel=0.08)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """300 samples of 60 from a known population: the true ratio is inside 95 % of the time, give or take."""
    generator = np.random.default_rng(2)
    inside = shares = 0
    for trial in range(300):
        whole = generator.integers(1, 20, 60)
        part = generator.binomial(whole, 0.3)
        found = ratio(part.tolist(), whole.tolist(), 300, seed=trial)
        inside += found.low <= 0.3 <= found.high  # type: ignore[operator]
        one = share((generator.random(60) < 0.1).tolist())
        shares += one.low <= 0.1 <= one.high  # type: ignore[operator]
    assert 0.9 <= inside / 300 <= 0.99
    assert 0.9 <= shares / 300 <= 0.99


def test_a_ratio_weighs_items_by_their_size_and_is_seeded() -> None:
    found = ratio([1.0, 9.0], [1.0, 3.0], 200, seed=0)
    assert found.value == 2.5
    assert found == ratio([1.0, 9.0], [1.0, 3.0], 200, seed=0)
    assert (found.low, found.high) == (1.0, 3.0)
