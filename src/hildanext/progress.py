"""Progress on stderr (a bar on a terminal, a line every ten seconds elsewhere), messages, and stop signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY_S = 10.0


class Advance(Protocol):
    """Sets the progress: `done` is the absolute count, `note` a text shown after it."""

    def __call__(self, done: float, note: str = "") -> None: ...


def say(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Format seconds: 4210.0 -> '1:10:10', 70.0 -> '1:10'."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"


@contextmanager
def progress(title: str, total: float | None, unit: str = "", start: float = 0) -> Iterator[Advance]:
    """Yield `advance(done, note)`, where `done` counts from 0 to `total` (None: unknown).

    On a terminal rich draws a bar with rate and remaining time; elsewhere a line with both appears every ten seconds.
    start: the count at the beginning, for resumed work. It is left out of the rate.
    """
    began = last = time.monotonic()

    def rate(done: float) -> float:
        return (done - start) / max(time.monotonic() - began, 1e-9)

    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]:.1f}/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=int(start), note="", rate=0.0)
            yield lambda done, note="": bar.update(task, completed=done, note=note, rate=rate(done))
        return

    def advance(done: float, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY_S and done != total:
            return
        last, speed = now, rate(done)
        left = f", {duration((total - done) / speed)} left" if total and speed > 0 else ""
        of = f"/{total:g}" if total else ""
        say(f"{title}: {done:g}{of} {unit}, {speed:.1f}/s{left}{'  ' + note if note else ''}")

    yield advance


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show on stderr that the block runs: `title` with the elapsed time on a terminal, removed at the end, else a line."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        say(f"{title} ...")
        yield
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(title, total=None)
        yield


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """Record SIGINT and SIGTERM within the block instead of ending the process.

    Yields a function that returns the name of the last signal, or None. Outside the main thread, signals are not
    recorded.
    """
    received: list[str] = []

    def remember(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)

    try:
        old = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may set handlers
        yield lambda: None
        return
    try:
        yield lambda: received[-1] if received else None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
