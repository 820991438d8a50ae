"""Runs code that a model wrote, shut in (see `jail`), against the tests of its problem. Linux only.

What the code cannot do: reach the network, see or signal another process, read the environment or any file but Python's
and the system's libraries, write anywhere but into an empty folder in memory, outlive its time, or fill memory, disk or
process table. Where the kernel does not allow the namespaces that this takes, nothing is run.

What it does not stop: the verdict is written by the process that ran the code, so code that looks for the token in the
interpreter's own frames can fake a pass. Printing, exit codes and early exits cannot. Few system calls are forbidden: a hole
in the kernel stays a hole. For code by an enemy use a machine of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from hildanext.errors import UsageError
from hildanext.evaluate import jail

# Candidate and tests are compiled apart, so that an open string in the one cannot swallow the other.
DRIVER = """
import json, os, sys
verdict = int(sys.argv[1])
given = json.loads(sys.stdin.buffer.read())
token = given["token"]
outcome = "failed"
try:
    names = {"__name__": "candidate"}
    exec(compile(given["program"], "candidate", "exec"), names)
    exec(compile(given["test"], "test", "exec"), names)
    names["check"](names[given["entry_point"]])
    outcome = token
except BaseException as error:
    outcome = f"{type(error).__name__}: {error}"[:500]
os.write(verdict, outcome.encode(errors="replace"))
os._exit(0)
"""
MOST_VERDICT = 4096


class Limits(NamedTuple):
    """What a program may use. Memory is each process's own: together they may take `processes` times as much."""

    cpu_s: int = 5
    wall_s: float = 20.0  # of everything, the shutting in included
    memory_bytes: int = 320 << 20
    file_bytes: int = 4 << 20
    disk_bytes: int = 16 << 20
    processes: int = 6  # process 1, the program, and what it starts, threads too
    open_files: int = 64


class Verdict(NamedTuple):
    """Whether the tests passed, and what ended the program if not."""

    passed: bool
    reason: str


def visible_paths(executable: str) -> list[str]:
    """What a Python needs to start: its own folders and the system's libraries. None lies inside another."""
    prefixes = [Path(executable).parents[1], Path(sys.base_prefix), Path(sys.base_exec_prefix)]
    wanted = sorted({*map(str, prefixes), "/usr", "/lib", "/lib64", "/nix/store"})
    found: list[str] = []
    for path in wanted:
        if path != "/" and os.path.exists(path) and not any(path.startswith(other + "/") for other in found):
            found.append(path)
    return found


def run_check(program: str, test: str, entry_point: str, limits: Limits | None = None) -> Verdict:
    """Run `program`, then `test`, which defines `check`, then `check(entry_point)`; passed if nothing was raised.

    Raises UsageError where code cannot be shut in.
    """
    if sys.platform != "linux":
        raise UsageError("model-written code is run on Linux only: other systems have no namespaces to shut it in")
    limits = limits or Limits()
    executable = os.path.realpath(sys.executable)
    token = secrets.token_hex(16)
    given = {"token": token, "program": program, "test": test, "entry_point": entry_point}
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory(prefix="hildanext-code-") as root, open(read_end, "rb") as verdict:
        spec = {"root": os.path.realpath(root), "executable": executable, "driver": DRIVER, "verdict": write_end}
        spec["parent"] = os.getpid()
        line = {"spec": spec, "limits": limits._asdict(), "visible": visible_paths(executable)}
        try:
            process = subprocess.Popen(
                [executable, "-I", "-S", jail.__file__, json.dumps(line)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                pass_fds=(write_end,),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            _, complaint = process.communicate(json.dumps(given).encode(), timeout=limits.wall_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # process 1 inside dies with it, and everything inside with that
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                return Verdict(False, f"no end within {limits.wall_s:g} s")
            raise
        if process.returncode == jail.REFUSED and complaint:  # the program has no way to this stderr
            raise UsageError(
                "model-written code cannot be shut in on this machine, so it is not run: "
                f"{complaint.decode(errors='replace')}; it takes root or unprivileged user namespaces"
            )
        return _judge(verdict.read(MOST_VERDICT).decode(errors="replace"), token, process.returncode)


def _judge(written: str, token: str, code: int) -> Verdict:
    if written == token:
        return Verdict(True, "passed")
    if token in written:  # something else wrote beside it
        return Verdict(False, "the verdict was tampered with")
    if written:
        return Verdict(False, written.splitlines()[0][:200])
    signals = {128 + one.value: one.name for one in signal.Signals}
    ended = f"signal {signals[code]}" if code in signals else f"exit code {code}"
    return Verdict(False, f"ended by {ended} before the tests did")


def require_sandbox() -> None:
    """Raise UsageError unless code can be shut in here: a program that passes, and one that does not."""
    good = run_check("def f():\n    return 1\n", "def check(f):\n    assert f() == 1\n", "f")
    if not good.passed:
        raise UsageError(
            f"model-written code cannot be run on this machine: a program that is right fails: {good.reason}"
        )
