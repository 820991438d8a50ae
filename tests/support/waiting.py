"""Waiting for what another thread or process does: for the thing itself; the limit is only there to end a broken test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LAST_RESORT = 900.0  # seconds; far beyond what the slowest machine needs


def until(condition: Callable[[], T]) -> T:
    """What `condition` returns as soon as that is true; long waits are looked at less often, for a look may cost a request."""
    deadline, pause = time.monotonic() + LAST_RESORT, 0.001
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {LAST_RESORT / 60:g} minutes")
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)
    return found
