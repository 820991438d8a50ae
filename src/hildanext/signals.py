"""SIGINT and SIGTERM as a request to finish what is under way, not as a death."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """Within the block SIGINT and SIGTERM are remembered instead of killing; yields 'which one came, if any'."""
    received: list[str] = []

    def remember(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)

    try:
        old = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are the caller's
        yield lambda: None
        return
    try:
        yield lambda: received[-1] if received else None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
