"""Figures with 95 % confidence intervals: Wilson score for shares, bootstrap for means and ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Z = 1.959963984540054  # two-sided 95 % of the normal distribution


class Figure(NamedTuple):
    """A number, its interval (None: no interval) and the number of items behind it."""

    value: float
    low: float | None
    high: float | None
    n: int
    interval: Literal["wilson", "bootstrap"] | None


def plain(value: float, n: int) -> Figure:
    """A figure without an interval."""
    return Figure(value, None, None, n, None)


def share(hits: Sequence[bool]) -> Figure:
    """Share of hits with the Wilson score interval (Wilson 1927); nan without items."""
    n = len(hits)
    if n == 0:
        return plain(math.nan, 0)
    p = sum(hits) / n
    middle, width = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return Figure(
        p, min(max((middle - width) / scale, 0.0), p), max(min((middle + width) / scale, 1.0), p), n, "wilson"
    )


def ratio(parts: Sequence[float], wholes: Sequence[float], resamples: int, seed: int) -> Figure:
    """sum(parts) / sum(wholes), seeded percentile bootstrap over items (Efron 1979); nan if the wholes sum to 0."""
    a, b = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    if b.sum() == 0:
        return plain(math.nan, len(a))
    drawn = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    totals = b[drawn].sum(1)
    found = a[drawn].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(found, [2.5, 97.5])
    return Figure(float(a.sum() / b.sum()), float(low), float(high), len(a), "bootstrap")


def mean(values: Sequence[float], resamples: int, seed: int) -> Figure:
    return ratio(values, [1.0] * len(values), resamples, seed)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is right, from c = `right` of n samples.

    1 - C(n-c, k) / C(n, k): Chen et al. 2021 (arXiv 2107.03374) eq. 1.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
