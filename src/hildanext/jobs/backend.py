"""Where a job's attempts run: what a backend has to do. The loop that uses one is in `watcher`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from hildanext.errors import HildaError
from hildanext.jobs.store import Job


class BackendError(HildaError):
    """The backend does not answer. What runs goes on; the next look sees it all again."""


class Look(NamedTuple):
    """What a backend knows of an attempt.

    unknown: it never got it; waiting: it has not begun; alive: it runs; gone: nothing of it runs any more.
    """

    state: Literal["unknown", "waiting", "alive", "gone"]
    code: int | None = None  # of a gone one, where the backend heard it
    note: str | None = None  # of a gone one, why


class Backend(Protocol):
    """An attempt is (job.id, job.attempt); its folder holds what `child` writes. All but `trouble` may raise BackendError."""

    every_s: float  # between two looks
    python: str  # what runs the commands, where they run

    def backend_id(self, job: Job) -> str | None:
        """What the backend calls the attempt; the same whoever asks, before it starts and after."""

    def trouble(self) -> str | None:
        """Why it can take no job now."""

    def start(self, job: Job, folder: Path, command: list[str]) -> None:
        """Start the attempt. One that it has already is left as it is. Raises OSError where it never can."""

    def look(self, job: Job, folder: Path) -> Look:
        """What has become of the attempt."""

    def stop(self, job: Job, folder: Path) -> None:
        """Ask it to stop, and kill it after `jobs.cancel_s`. Called at every look until it is gone."""
