"""Commands in processes forked from a server that has imported the package: a real process each, without five seconds of imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

from hildanext import cli
from hildanext.training import trainer
from support.training import plain_curves

Fault = Callable[
    [], None
]  # runs in the child before the command and may replace parts of the package; sent by its name
PRELOADED = [
    "support.forked",
    "hildanext.training.dpo",
    "hildanext.server",
    "peft",
    "bitsandbytes",
    "torch.distributed.fsdp",
]


class Child:
    """`hildanext ARGV` in a forked process; its output goes into two files of `folder`, where it also runs if told so."""

    def __init__(
        self,
        argv: Sequence[object],
        folder: Path,
        fault: Fault | None = None,
        env: Mapping[str, str] | None = None,
        *,
        moves: bool = False,
    ) -> None:
        self.argv = [str(word) for word in argv]
        number = len(list(folder.glob("stdout-*.txt")))
        self.stdout, self.stderr = (folder / f"{name}-{number}.txt" for name in ("stdout", "stderr"))
        for file in (self.stdout, self.stderr):
            file.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        home = folder if moves else Path.cwd()
        self.process = context.Process(
            target=_main, args=(self.argv, fault, dict(env or {}), home, self.stdout, self.stderr)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit status, or minus the number of the signal that ended it; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> subprocess.CompletedProcess[str]:
        self.process.join()
        assert self.process.exitcode is not None
        return subprocess.CompletedProcess(
            self.argv, self.process.exitcode, self.stdout.read_text(), self.stderr.read_text()
        )


def run(
    argv: Sequence[object], folder: Path, fault: Fault | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Wait for a command's end."""
    return Child(argv, folder, fault, env).wait()


def run_group(
    n: int, argv: Sequence[object], folder: Path, fault: Fault | None = None
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
    children = [Child(argv, folder, fault, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)]
    running = {child.process.sentinel: child for child in children}
    while running:
        for ended in wait(list(running)):
            if running.pop(ended).wait().returncode:  # type: ignore[index]
                for other in running.values():
                    other.send_signal(signal.SIGTERM)
    done = [child.wait() for child in children]
    failed = [each.returncode for each in done if each.returncode not in (0, -signal.SIGTERM)]
    return subprocess.CompletedProcess(
        done[0].args,
        failed[0] if failed else max((each.returncode for each in done), key=abs),
        "".join(each.stdout for each in done),
        "".join(each.stderr for each in done),
    )


def _main(argv: list[str], fault: Fault | None, env: dict[str, str], home: Path, stdout: Path, stderr: Path) -> None:
    """The child: as `python -m hildanext.cli` would run and end."""
    for file, number in ((stdout, 1), (stderr, 2)):
        target = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    os.environ |= env
    os.chdir(home)
    trainer.draw_curves = plain_curves
    try:
        if fault is not None:
            fault()
        sys.exit(cli.main(argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # multiprocessing leaves it out; coverage saves its data there
