"""A server for tests: the real application on a loopback port, in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from fastapi.testclient import TestClient

from hildanext.config import Config
from hildanext.engines import Engine, open_engine
from hildanext.jobs.local import LocalJobs
from hildanext.server import make_app
from hildanext.server.worker import Worker


@contextlib.contextmanager
def running(
    config: Config, opener: Callable[[Config], Engine] = open_engine, keys: list[bytes] | None = None
) -> Iterator[tuple[str, Worker]]:
    """(URL, worker) of a server whose engine is open; stopped as SIGTERM would when the block ends."""
    app = make_app(config, opener, keys or [])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # a slow reader is soon felt
        settings = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=10)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        worker: Worker = app.state.worker
        try:
            while worker.state == "loading" and thread.is_alive():
                thread.join(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", worker
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def client(
    config: Config, engine: Engine | None = None, keys: list[bytes] | None = None, jobs: LocalJobs | None = None
) -> Iterator[TestClient]:
    """A client that calls the application without a socket, once its engine is open."""
    app = make_app(config, lambda config: engine or open_engine(config), keys or [], jobs)
    with TestClient(app, base_url="http://127.0.0.1:8000") as found:
        while app.state.worker.state == "loading":
            time.sleep(0.001)
        yield found
