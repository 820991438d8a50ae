"""Commands in processes forked from a server that has imported the package: a real process each, without five seconds of imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple, Protocol

from torch.distributed import TCPStore

from hildanext import cli
from hildanext.training import trainer
from support.training import plain_curves

PRELOADED = ["hildanext.training.convert", "hildanext.training.dpo", "hildanext.server", "support.forked"]


class Process(Protocol):
    """What is used of `multiprocessing.process.BaseProcess`."""

    pid: int | None
    exitcode: int | None
    sentinel: int

    def join(self, timeout: float | None = None) -> None: ...
    def kill(self) -> None: ...
    def terminate(self) -> None: ...


class Child(NamedTuple):
    """A command that runs; its output goes into two files."""

    argv: list[str]
    process: Process
    stdout: Path
    stderr: Path

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and output; a process that a signal ended has minus its number."""
        self.process.join()
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess(
            self.argv, self.process.exitcode, self.stdout.read_text(), self.stderr.read_text()
        )


def start(
    argv: list[object], folder: Path, fault: Callable[[], None] | None = None, env: Mapping[str, str] | None = None
) -> Child:
    """`hildanext ARGV` in a forked process. `fault` runs there first and may replace parts of the package; output goes to `folder`."""
    words, changes = [str(word) for word in argv], dict(env or {})
    number = len(list(folder.glob("stdout-*.txt")))
    files = [folder / f"{name}-{number}.txt" for name in ("stdout", "stderr")]
    for file in files:
        file.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_main, args=(words, fault, changes, *files))
    process.start()
    return Child(words, process, *files)


def run(
    argv: list[object], folder: Path, fault: Callable[[], None] | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`start`, and wait for its end."""
    return start(argv, folder, fault, env).wait()


def run_group(
    n: int, argv: list[object], folder: Path, fault: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """`hildanext ARGV` in `n` processes of one training, as torchrun starts them: where one fails, the others get SIGTERM."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "GROUP_RANK": "0",
    }
    children = [start(argv, folder, fault, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)]
    running = {child.process.sentinel: child.process for child in children}
    while running:
        for ended in wait(list(running)):
            process = running.pop(ended)  # type: ignore[index]
            process.join()
            if process.exitcode:
                for other in running.values():
                    other.terminate()
    done = [child.wait() for child in children]
    failed = [each.returncode for each in done if each.returncode not in (0, -signal.SIGTERM)]
    return subprocess.CompletedProcess(
        done[0].args,
        failed[0] if failed else max((each.returncode for each in done), key=abs),
        "".join(each.stdout for each in done),
        "".join(each.stderr for each in done),
    )


def _main(argv: list[str], fault: Callable[[], None] | None, env: dict[str, str], stdout: Path, stderr: Path) -> None:
    """The child: as `python -m hildanext.cli` would run and end."""
    for file, number in ((stdout, 1), (stderr, 2)):
        target = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    os.environ |= env
    trainer.draw_curves = plain_curves
    try:
        if fault is not None:
            fault()
        sys.exit(cli.main(argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # multiprocessing leaves it out; coverage saves its data there
