"""The local backend: each attempt is a process on this machine.

The state of an attempt is in its folder (see `child.py`), so a restarted server finds its running jobs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from hildanext.config import JobsConfig
from hildanext.jobs.backend import Look
from hildanext.jobs.child import is_held
from hildanext.jobs.store import Job


class LocalBackend:
    every_s = 0.2

    def __init__(self, config: JobsConfig, environment: Mapping[str, str]) -> None:
        """`environment`: environment variables of the jobs' processes."""
        self.config, self.environment = config, environment
        self.python = sys.executable
        self.processes: dict[tuple[str, int], subprocess.Popen[bytes]] = {}  # started by this process
        self.told: dict[tuple[str, int], float] = {}  # time at which a cancelled attempt was sent SIGTERM

    def backend_id(self, job: Job) -> None:
        return None  # a process id exists only after the start; the lock in the folder identifies the attempt

    def trouble(self) -> None:
        return None

    def start(self, job: Job, folder: Path, command: list[str]) -> None:
        # A new session: signals that stop the server do not reach its jobs.
        self.processes[job.id, job.attempt] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=self.environment,
        )

    def look(self, job: Job, folder: Path) -> Look:
        attempt = (job.id, job.attempt)
        process = self.processes.get(attempt)
        has_ended = (folder / f"exit-{job.attempt}.json").is_file()
        if process is not None:
            if has_ended:  # writing the file is the child's last action
                process.wait()
            if process.poll() is None:
                return Look("alive")
            del self.processes[attempt]
        if has_ended:
            return Look("gone")
        if not (folder / f"started-{job.attempt}.json").is_file():
            return Look("unknown")  # the server died before the attempt started
        return Look("alive" if is_held(folder) else "gone")

    def stop(self, job: Job, folder: Path) -> None:
        """SIGTERM once, SIGKILL after `jobs.cancel_s`."""
        try:
            started = (folder / f"started-{job.attempt}.json").read_text()
        except FileNotFoundError:  # the attempt is about to start; the next poll tries again
            return
        group = json.loads(started or "{}").get("group")
        if group is None:
            return
        first = self.told.setdefault((job.id, job.attempt), now := time.monotonic())
        number = signal.SIGTERM if first == now else signal.SIGKILL if now > first + self.config.cancel_s else None
        if number is not None:
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                return
