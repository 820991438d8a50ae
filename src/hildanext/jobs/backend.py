"""The interface of a backend, which runs the attempts of jobs. `watcher.py` calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from hildanext.errors import HildaError
from hildanext.jobs.store import Job


class BackendError(HildaError):
    """The backend does not answer. Running attempts are not affected; the watcher tries again."""


class Look(NamedTuple):
    """A backend's view of an attempt.

    unknown: never submitted; waiting: submitted, not started; alive: running; gone: no process is left.
    """

    state: Literal["unknown", "waiting", "alive", "gone"]
    code: int | None = None  # exit code of a gone attempt, if the backend knows it
    note: str | None = None  # why the attempt is gone, if the backend knows


class Backend(Protocol):
    """Runs attempts, each named by (job.id, job.attempt). Every method except `trouble` may raise BackendError.

    `folder` is the job's folder, which holds the files that `child` writes.
    """

    every_s: float  # seconds between two polls
    python: str  # Python interpreter for the commands, on the machine where they run

    def backend_id(self, job: Job) -> str | None:
        """Return the backend's name for the attempt. It depends on the job only, so it is known before the start."""

    def trouble(self) -> str | None:
        """Return why the backend accepts no jobs now, or None."""

    def start(self, job: Job, folder: Path, command: list[str]) -> None:
        """Start the attempt; does nothing if it was already submitted. Raises OSError if it can never start."""

    def look(self, job: Job, folder: Path) -> Look:
        """Return the current state of the attempt."""

    def stop(self, job: Job, folder: Path) -> None:
        """Ask the attempt to stop; kill it after `jobs.cancel_s`. Called at every poll until it is gone."""
