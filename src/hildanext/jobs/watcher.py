"""The loop that starts queued jobs, at most `jobs.at_once`, and records how they end, with any backend."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hildanext.config import JobsConfig
from hildanext.jobs.backend import Backend, BackendError, Look
from hildanext.jobs.child import forbid
from hildanext.jobs.kinds import Options, command
from hildanext.jobs.store import STATES, Job, State, Store, StoreError
from hildanext.progress import say

INTERRUPTED = "the process ended without an exit code (killed, or out of memory or disk space); resume the job"


class Jobs:
    """Starts queued jobs and records how they end, in a thread. `trouble`: why it cannot, or None."""

    def __init__(self, store: Store, runs: Path, config: JobsConfig, backend: Backend) -> None:
        self.store, self.runs, self.config, self.backend = store, runs, config, backend
        self.counts = dict.fromkeys(STATES, 0)
        self.trouble: str | None = None
        self.why_not: Callable[[Job], str | None] = lambda job: None  # why a queued job must wait
        self.run_lock = threading.Lock()  # held while a run folder is checked and claimed for a job
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._watch, name="jobs")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop watching. Jobs keep running; the next server finds them."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def wake(self) -> None:
        """Poll now, because something has changed."""
        self._wake.set()

    def counts_of(self, state: State) -> int:
        """Return the number of jobs in a state, as of the last poll."""
        return self.counts[state]

    def path(self, job_id: str) -> Path:
        """Return the job's own folder, which holds its configuration, log and result."""
        return self.runs / ".jobs" / job_id

    def run(self, job: Job) -> Path:
        """Return the run folder of a training or merging job."""
        return self.runs / (job.request["options"]["run"] or job.id)

    def _watch(self) -> None:
        while not self._stopping:
            try:
                self.tick()
                self._tell(None)
            except (StoreError, BackendError, OSError) as error:  # temporary: the next poll tries again
                self._tell(str(error))
            except Exception as error:  # noqa: BLE001  (unexpected; if the thread died, no job would start again)
                self._tell(f"{type(error).__name__}: {error}")
            self._wake.wait(self.backend.every_s)
            self._wake.clear()

    def _tell(self, trouble: str | None) -> None:
        """Report a new trouble once, and its end once."""
        before, self.trouble = self.trouble, trouble
        if trouble != before:
            with contextlib.suppress(OSError, ValueError):  # stderr is closed
                say(f"jobs: {trouble}; trying again" if trouble else "jobs: working again")

    def tick(self) -> None:
        """Poll all jobs once and start queued ones. Raises StoreError, BackendError, OSError; keeps earlier results."""
        busy, failure = 0, None
        try:
            running = self.store.list(("running",))
            mine = [job for job in running if job.backend_id == self.backend.backend_id(job)]
            for job in mine:
                try:
                    busy += not self._settle(job)
                except BackendError as error:
                    busy, failure = busy + 1, error
            if failure is not None:
                raise failure
            if (trouble := self.backend.trouble()) is not None:
                raise BackendError(trouble)
            self._start_waiting(self.config.at_once - busy)
            if len(mine) < len(running):
                raise BackendError(
                    f"{len(running) - len(mine)} running jobs belong to another backend than {self.config.backend!r}"
                )
        finally:
            self.counts = self.store.counts()

    def _start_waiting(self, free: int) -> None:
        ready = (job for job in self.store.list(("queued",)) if self.why_not(job) is None)
        for job in itertools.islice(ready, max(0, free)):
            # The backend's name is stored before the start: if the server dies in between, the next one finds the job.
            if self.store.move(job, "running", started=time.time(), backend_id=self.backend.backend_id(job)):
                self._start(self.store.get(job.id))

    def _start(self, job: Job) -> None:
        folder = self.path(job.id)
        options = Options.model_validate(job.request["options"])
        resume = (
            job.attempt > 1 and (self.run(job) / "config.json").is_file()
        )  # without the file the training had not started
        python = self.backend.python
        line = command(python, job.kind, options, job.id, folder, resume=resume)
        child = [python, "-m", "hildanext.jobs.child", str(folder), str(job.attempt), "--", *line]
        try:
            self.backend.start(job, folder, child)
        except OSError as error:
            self._move(job, "failed", None, f"cannot start the job: {error}")

    def _settle(self, job: Job) -> bool:
        """Whether a running job has ended; its end is recorded. Starts an attempt that was never submitted."""
        folder = self.path(job.id)
        look = self.backend.look(job, folder)
        if look.state == "gone":
            self._ended(job, look)
            return True
        if look.state != "alive" and job.cancel_requested and forbid(folder, job.attempt):
            if look.state == "waiting":
                self.backend.stop(job, folder)
            self._move(job, "cancelled", None, None)
            return True
        if look.state == "unknown":
            self._start(job)
        elif job.cancel_requested:
            self.backend.stop(job, folder)
        return False

    def _ended(self, job: Job, look: Look) -> None:
        folder = self.path(job.id)
        exit_file, started_file = (folder / f"{name}-{job.attempt}.json" for name in ("exit", "started"))
        code = json.loads(exit_file.read_text())["code"] if exit_file.is_file() else look.code
        if job.cancel_requested:
            self._move(job, "cancelled", code, None)
        elif code is None and started_file.is_file():
            self._move(job, "interrupted", None, look.note or INTERRUPTED)
        elif code == 0 and _stopped(folder / f"stdout-{job.attempt}.json"):
            self._move(job, "interrupted", code, "stopped by a signal after saving a checkpoint; resume the job")
        elif code == 0:
            self._move(job, "done", code, None)
        else:
            self._move(job, "failed", code, look.note or _last_line(folder / "log.txt"))

    def _move(self, job: Job, to: State, code: int | None, note: str | None) -> None:
        self.store.move(job, to, exit_code=code, note=note, ended=time.time())


def _stopped(path: Path) -> bool:
    """Whether a training command's result says that it was stopped by a signal."""
    try:
        return json.loads(path.read_text()).get("finished") is False
    except (OSError, ValueError):
        return False


def _last_line(path: Path) -> str | None:
    """Return the last line of a log, which is the error message of a failed command."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\0", " ").strip().splitlines()
    return lines[-1][:500] if lines else None
