"""Runs code written by a model, isolated from the system (see jail.py), against the tests of its problem. Linux only.

The code cannot reach the network, see or signal other processes, read the environment, read files other than the
libraries of Python and the system, write outside an empty in-memory folder, exceed its time limit, or exhaust memory,
disk or process table. If the kernel does not allow the required namespaces, no code is run.

Limits of this protection: the process that runs the code also reports the verdict, so code that searches the
interpreter's frames for the token can fake a pass. Output, exit codes and early exits cannot. Only some system calls
are blocked, so kernel vulnerabilities remain reachable. Run hostile code on a separate machine.
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

# Candidate and tests are compiled separately, so an unterminated string in the candidate cannot hide the tests.
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
MAX_VERDICT_BYTES = 4096


class Limits(NamedTuple):
    """Resource limits of a program. `memory_bytes` is per process: all together can use `processes` times as much."""

    cpu_s: int = 5
    wall_s: float = 20.0  # wall-clock time, including the setup of the sandbox
    memory_bytes: int = 320 << 20
    file_bytes: int = 4 << 20
    disk_bytes: int = 16 << 20
    processes: int = 6  # process 1, the program, its children and threads
    open_files: int = 64


class Verdict(NamedTuple):
    """Whether the tests passed, and the reason if they did not."""

    passed: bool
    reason: str


def visible_paths(executable: str) -> list[str]:
    """Folders that Python needs to start: its own and the system's libraries. No folder is inside another."""
    prefixes = [Path(executable).parents[1], Path(sys.base_prefix), Path(sys.base_exec_prefix)]
    wanted = sorted({*map(str, prefixes), "/usr", "/lib", "/lib64", "/nix/store"})
    found: list[str] = []
    for path in wanted:
        if path != "/" and os.path.exists(path) and not any(path.startswith(other + "/") for other in found):
            found.append(path)
    return found


def run_check(program: str, test: str, entry_point: str, limits: Limits | None = None) -> Verdict:
    """Run `program`, then `test`, which defines `check`, then `check(entry_point)`; passed if nothing raises.

    Raises UsageError if this machine cannot isolate the code.
    """
    if sys.platform != "linux":
        raise UsageError("code written by a model runs on Linux only; other systems lack the namespaces to isolate it")
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
            _, stderr = process.communicate(json.dumps(given).encode(), timeout=limits.wall_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # also ends process 1 of the sandbox, and with it all others
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                return Verdict(False, f"not finished after {limits.wall_s:g} s")
            raise
        if process.returncode == jail.REFUSED and stderr:  # the program itself cannot write to this stderr
            raise UsageError(
                "code written by a model cannot be isolated on this machine, so it is not run: "
                f"{stderr.decode(errors='replace')}; isolation needs root or unprivileged user namespaces"
            )
        return _judge(verdict.read(MAX_VERDICT_BYTES).decode(errors="replace"), token, process.returncode)


def _judge(written: str, token: str, code: int) -> Verdict:
    if written == token:
        return Verdict(True, "passed")
    if token in written:  # the program wrote to the pipe as well
        return Verdict(False, "the verdict was tampered with")
    if written:
        return Verdict(False, written.splitlines()[0][:200])
    signals = {128 + known.value: known.name for known in signal.Signals}
    ended = f"signal {signals[code]}" if code in signals else f"exit code {code}"
    return Verdict(False, f"ended by {ended} before the tests finished")


def require_sandbox() -> None:
    """Raise UsageError unless a correct program runs isolated on this machine and passes."""
    verdict = run_check("def f():\n    return 1\n", "def check(f):\n    assert f() == 1\n", "f")
    if not verdict.passed:
        raise UsageError(
            f"code written by a model cannot be run on this machine: a correct program fails: {verdict.reason}"
        )
