"""A server for tests: the real application on a loopback port, in a thread; without a socket; in a process of its own."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn
from fastapi.testclient import TestClient

from hildanext.config import Config, parse_config
from hildanext.decoding.engines import Engine, open_engine
from hildanext.jobs.watcher import Jobs
from hildanext.server.app import make_app
from hildanext.server.connections import make_server
from hildanext.server.worker import Worker
from support import forked
from support.waiting import LAST_RESORT, until


@contextlib.contextmanager
def running(
    config: Config,
    opener: Callable[[Config], Engine] = open_engine,
    keys: list[bytes] | None = None,
    jobs: Jobs | None = None,
) -> Iterator[tuple[str, Worker]]:
    """(URL, worker) of a server whose engine is open; stopped as SIGTERM would when the block ends."""
    with stoppable(config, opener, keys, jobs) as (url, worker, _):
        yield url, worker


@contextlib.contextmanager
def stoppable(
    config: Config,
    opener: Callable[[Config], Engine] = open_engine,
    keys: list[bytes] | None = None,
    jobs: Jobs | None = None,
) -> Iterator[tuple[str, Worker, uvicorn.Server]]:
    """As `running`, with the server, whose `should_exit` does what SIGTERM would; it has `server.drain_s`."""
    app = make_app(config, opener, keys or [], jobs)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # a slow reader is soon felt
        # A slow machine may leave a connection idle for long.
        server = make_server(app, config.server.drain_s, idle_s=LAST_RESORT)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        worker: Worker = app.state.worker
        try:
            until(lambda: (worker.state != "loading" and server.started) or not thread.is_alive())
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", worker, server
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def client(
    config: Config, engine: Engine | None = None, keys: list[bytes] | None = None, jobs: Jobs | None = None
) -> Iterator[TestClient]:
    """A client that calls the application without a socket, once its engine is open."""
    app = make_app(config, lambda config: engine or open_engine(config), keys or [], jobs)
    with TestClient(app, base_url="http://127.0.0.1:8000") as found:
        until(lambda: app.state.worker.state != "loading")
        yield found


def asking(url: str, key: str = "none") -> openai.OpenAI:
    """OpenAI's client of a server; closed, with its connections, when its block ends."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@contextlib.contextmanager
def process(
    config: Config, folder: Path, *, port: int | None = None, fault: forked.Fault | None = None
) -> Iterator[tuple[str, forked.Child]]:
    """(URL, process) of `hildanext serve`, once it is ready; killed when the block ends."""
    url, argv = _command(config, folder, port)
    server = forked.Child(argv, folder, fault, moves=True)
    try:
        until_ready(url, lambda: server.poll() is None, server.stderr)
        yield url, server
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def launched(config: Config, folder: Path, before: tuple[str, ...]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """As `process`, started by the command `before`, in an interpreter of its own."""
    url, argv = _command(config, folder, None)
    with open(folder / "log.txt", "ab") as log:
        command = [*before, sys.executable, "-m", "hildanext.cli", *argv]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        until_ready(url, lambda: server.poll() is None, folder / "log.txt")
        yield url, server
    finally:
        server.kill()
        server.communicate()


def _command(config: Config, folder: Path, port: int | None) -> tuple[str, list[str]]:
    """(URL, arguments) of a server on loopback."""
    port = port or free_port()
    raw = config.model_dump(mode="json")
    raw["server"]["port"] = port
    (folder / "serve.json").write_text(json.dumps(raw))
    return f"http://127.0.0.1:{port}", ["serve", "--json", "--config", str(folder / "serve.json")]


def until_ready(url: str, lives: Callable[[], bool], log: Path) -> None:
    """Wait until the server answers that it is ready; fail at once where its process has ended."""
    with httpx2.Client(base_url=url, timeout=LAST_RESORT) as client:

        def ready() -> bool:
            assert lives(), log.read_text()
            with contextlib.suppress(httpx2.TransportError):
                return client.get("/health/ready").status_code == 200
            return False

        until(ready)


def dummy(decode: dict[str, Any] | None = None, **keys: Any) -> Config:
    return parse_config({"engine": {"order": ["dummy"]}, "decode": decode or {}, "server": keys})
