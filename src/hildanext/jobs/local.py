"""The local backend: subprocesses of this machine, a few at a time, watched by a thread.

What is true of a running job stands in its folder (see `child`), so a server that was killed finds its jobs again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from hildanext.config import JobsConfig
from hildanext.jobs.child import is_held
from hildanext.jobs.kinds import Options, command
from hildanext.jobs.store import STATES, Job, State, Store, StoreError
from hildanext.progress import say

EVERY_S = 0.2
INTERRUPTED = "its process ended without saying how (killed, or out of memory or disk); resume it"


class LocalJobs:
    """Starts queued jobs, at most `jobs.at_once`, and notes what becomes of them."""

    def __init__(self, store: Store, runs: Path, config: JobsConfig) -> None:
        self.store, self.runs, self.config = store, runs, config
        self.counts = dict.fromkeys(STATES, 0)
        self.processes: dict[tuple[str, int], subprocess.Popen[bytes]] = {}  # children of this very process
        self.told: dict[str, float] = {}  # when a cancelled job was sent SIGTERM
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._watch, name="jobs")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop watching. Jobs go on; the next server finds them."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def wake(self) -> None:
        """Something changed: look now."""
        self._wake.set()

    def counts_of(self, state: State) -> int:
        """Jobs in a state at the last look."""
        return self.counts[state]

    def path(self, job_id: str) -> Path:
        """Folder of what a job reads and writes beside its run: configuration, log, result."""
        return self.runs / ".jobs" / job_id

    def run(self, job: Job) -> Path:
        """The run's folder of a training or merging job."""
        return self.runs / (job.request["options"]["run"] or job.id)

    def _watch(self) -> None:
        while not self._stopping:
            try:
                self.tick()
            except (StoreError, OSError) as error:  # locked, full or gone for now: the next look sees it all again
                say(f"jobs: {error}; trying again")
            self._wake.wait(EVERY_S)
            self._wake.clear()

    def tick(self) -> None:
        """One look at everything."""
        running = [job for job in self.store.list(("running",)) if not self._settle(job)]
        for job in self.store.list(("queued",))[: max(0, self.config.at_once - len(running))]:
            if self.store.move(job, "running", started=time.time()):
                self._spawn(self.store.get(job.id))
        self.counts = self.store.counts()

    def _spawn(self, job: Job) -> None:
        folder = self.path(job.id)
        options = Options.model_validate(job.request["options"])
        resume = job.attempt > 1 and (self.run(job) / "config.json").is_file()  # else it had not begun
        line = command(job.kind, options, job.id, folder, resume=resume)
        child = [sys.executable, "-m", "hildanext.jobs.child", str(folder), str(job.attempt), "--", *line]
        # A session of its own: what stops the server does not stop its jobs.
        try:
            self.processes[job.id, job.attempt] = subprocess.Popen(
                child, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            self.store.move(job, "failed", note=f"cannot start: {error}", ended=time.time())

    def _settle(self, job: Job) -> bool:
        """Whether a running job has ended; if so it is noted. One that never began begins."""
        folder, process = self.path(job.id), self.processes.get((job.id, job.attempt))
        is_ours = process is not None and process.poll() is None
        exit_file, started_file = (folder / f"{name}-{job.attempt}.json" for name in ("exit", "started"))
        if exit_file.is_file():
            self._ended(job, json.loads(exit_file.read_text())["code"])
            return True
        if not started_file.is_file():
            if is_ours:
                return False
            if job.cancel_requested:
                self._move(job, "cancelled", None, None)
                return True
            self._spawn(job)  # the server died before it began
            return False
        if is_ours or is_held(folder):
            if job.cancel_requested:
                self._terminate(job, json.loads(started_file.read_text() or "{}").get("group"))
            return False
        if exit_file.is_file():  # it came between the two looks
            return False
        self._move(job, "cancelled" if job.cancel_requested else "interrupted", None, INTERRUPTED)
        return True

    def _terminate(self, job: Job, group: int | None) -> None:
        """SIGTERM once, SIGKILL after `jobs.cancel_s`."""
        if group is None:
            return
        first = self.told.setdefault(job.id, now := time.monotonic())
        number = signal.SIGTERM if first == now else signal.SIGKILL if now > first + self.config.cancel_s else None
        if number is not None:
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                return

    def _ended(self, job: Job, code: int) -> None:
        if job.cancel_requested:
            self._move(job, "cancelled", code, None)
        elif code == 0 and _stopped(self.path(job.id) / f"stdout-{job.attempt}.json"):
            self._move(job, "interrupted", code, "it was told to stop, and stopped at a checkpoint; resume it")
        elif code == 0:
            self._move(job, "done", code, None)
        else:
            self._move(job, "failed", code, _last_line(self.path(job.id) / "log.txt"))

    def _move(self, job: Job, to: State, code: int | None, note: str | None) -> None:
        self.store.move(job, to, exit_code=code, note=note, ended=time.time())
        self.told.pop(job.id, None)
        process = self.processes.pop((job.id, job.attempt), None)
        if process is not None:
            process.wait()


def _stopped(path: Path) -> bool:
    """Whether a training command's result says that a signal stopped it."""
    try:
        return json.loads(path.read_text()).get("finished") is False
    except (OSError, ValueError):
        return False


def _last_line(path: Path) -> str | None:
    """The end of a log: the line that says what went wrong."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else None
