"""The process of a job's attempt: it runs the command and records its start and its exit code in files.

    python -m hildanext.jobs.child FOLDER ATTEMPT -- COMMAND ...

FOLDER/lock is locked while this process or the command lives; the kernel releases it in every case. started-N.json is
created exclusively, so that no attempt runs twice. exit-N.json holds the exit code. A restarted server reads them.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hildanext.files import write_json

STOPS = (signal.SIGTERM, signal.SIGINT)
REFUSED = 3  # exit code: this attempt is running or has already run


def is_held(folder: Path) -> bool:
    """Whether a process of the job is alive."""
    try:
        with open(folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def forbid(folder: Path, attempt: int) -> bool:
    """Prevent an attempt from ever starting. Returns False if it has already started."""
    try:
        with open(folder / f"started-{attempt}.json", "x") as file:
            json.dump({"forbidden": time.time()}, file)
    except FileExistsError:
        return False
    return True


def run(folder: Path, attempt: int, command: list[str]) -> int:
    """Run a command as an attempt of the job in `folder`. Returns its exit code, -N for signal N, or REFUSED."""
    with open(folder / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            started = os.open(folder / f"started-{attempt}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (BlockingIOError, FileExistsError):
            return REFUSED
        with os.fdopen(started, "w") as file:
            json.dump({"group": os.getpgid(0), "time": time.time()}, file)
        # Cancelling signals the whole process group. This process ignores it and records how the command ends.
        early: list[int] = []
        for number in STOPS:
            signal.signal(number, lambda number, _: early.append(number))
        # Signals are blocked while the command starts, so that it receives each of them exactly once.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        missed = list(early)  # received before the command started
        with open(folder / "log.txt", "ab") as log, open(folder / f"stdout-{attempt}.json", "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                pass_fds=[lock.fileno()],
                preexec_fn=_prepare(),
            )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            for earlier in missed:
                process.send_signal(earlier)
            code = process.wait()
        write_json(folder / f"exit-{attempt}.json", {"code": code, "time": time.time()})
        return code


def _prepare() -> Callable[[], None]:
    """Return the `preexec_fn` of the command: default signal handling, and on Linux SIGTERM if this process dies.

    Call it with the signals blocked. A signal that this process received before the command's process existed is sent to
    that process; one that came later was sent to both.
    """
    prctl, set_death_signal = (ctypes.CDLL(None).prctl if sys.platform == "linux" else None), 1  # PR_SET_PDEATHSIG
    waiting, parent = signal.sigpending(), os.getpid()

    def prepare() -> None:
        if prctl is not None:
            prctl(set_death_signal, signal.SIGTERM)
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        for number in ((_pending(parent) if prctl is not None else waiting) - signal.sigpending()) & set(STOPS):
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    return prepare


def _pending(process: int) -> set[int]:
    """The signals that a process has received and not handled yet, from Linux' /proc."""
    with open(f"/proc/{process}/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    mask = int(lines["SigPnd"], 16) | int(lines["ShdPnd"], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


if __name__ == "__main__":
    folder, attempt, dashes, *command = sys.argv[1:]
    assert dashes == "--"
    if not Path(folder).is_dir():
        sys.exit(f"{folder} does not exist on this machine; paths.runs must be on storage shared with the server")
    sys.exit(run(Path(folder), int(attempt), command) & 0xFF)
