"""Which rows a pass of EXACT decoding has: drafts to verify, and mask rows that draft for the next pass.

A pass costs about the same for every number of rows up to a limit (docs/hardware.md), so the plan fills that limit with
the rows that are worth most. Worth is counted in expected tokens:

    draft d_j              P(the first j drafts are right)
    row i of a group       P(exactly the drafts before the group are right)
                           * (P(the group's first i drafts will be right) - the worth of the row that verifies draft i)

Pure functions of numbers.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import NamedTuple

# The worth of a row of the next pass, in tokens. Without it, passes of long groups alternate with passes that verify them.
ROW_WORTH = 0.1
LEAST_WORTH = 1e-3  # the share of its gain that a row is worth at least: rows that are left are filled


class Plan(NamedTuple):
    """Rows of a pass: the last known token, `n_drafts` drafts, then groups. groups[s]: mask rows behind s drafts."""

    n_drafts: int
    groups: list[int]  # n_drafts + 1 numbers


def plan_rows(chances: list[float], fresh: list[float], rows: int) -> Plan:
    """The plan worth most within `rows` rows, of which one is the last known token's.

    chances: for each pending draft, the probability that it is right if all before it are. fresh: the same for the k
    rows of a new group, as measured. Both in [0, 1].
    """
    reach = list(accumulate(chances, mul, initial=1.0))  # reach[j]: the first j drafts are right
    gain = [max(right - ROW_WORTH, LEAST_WORTH * right) for right in accumulate(fresh, mul)]
    best, best_worth = Plan(0, [0]), -1.0
    for n_drafts in range(min(len(chances), max(rows - 1, 0)) + 1):
        stops = [reach[s] - reach[s + 1] for s in range(n_drafts)] + [reach[n_drafts]]
        # gain falls along a group, so the most valuable rows never skip one.
        offers = sorted(((-stop * g, s) for s, stop in enumerate(stops) for g in gain), key=lambda offer: offer[0])
        taken = offers[: max(rows - 1 - n_drafts, 0)]
        worth = sum(reach[1 : n_drafts + 1]) - sum(value for value, _ in taken)
        if worth > best_worth:
            sizes = [0] * (n_drafts + 1)
            for _, s in taken:
                sizes[s] += 1
            best, best_worth = Plan(n_drafts, sizes), worth
    return best
