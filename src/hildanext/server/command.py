"""The `serve` command: read the API keys, bind the port, open the jobs and run the application until a signal.

The default address is loopback. Any other address requires API keys, which are checked before a request body is read.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hildanext.config import Config, ServerConfig
from hildanext.decoding import engines
from hildanext.errors import ConfigError, HildaError
from hildanext.jobs.backend import Backend
from hildanext.jobs.local import LocalBackend
from hildanext.jobs.store import Store
from hildanext.jobs.watcher import Jobs
from hildanext.progress import say, stop_on_signals
from hildanext.server.app import make_app
from hildanext.server.connections import make_server
from hildanext.server.guard import STALL_S
from hildanext.server.keys import KEYS_VARIABLE, read_keys


def bind(server: ServerConfig) -> socket.socket:
    """Return a socket bound to `server.host` and `server.port`, not yet listening. Raises ConfigError on failure."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    # Name TCP explicitly: asyncio disables Nagle's algorithm only then. It costs 40 ms on every kept connection.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # on Windows the option would take over a port that is in use
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # without a timeout, unread bytes of a closed connection are kept forever
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_S * 1000))
    try:
        sock.bind((server.host, server.port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"'server.port': cannot listen on {server.host}:{server.port}: {error.strerror}; choose another host or port"
        ) from None
    return sock


def open_engine(config: Config) -> engines.Engine:
    """Open the engine and report it, with the reasons of the engines passed over, on stderr.

    A first `serve` without the weights of the shipped model starts with the dummy engine; it is never ready.
    """
    engine = engines.open_engine(config, stand_in=True)
    engines.say_passed_over(engine)
    say(f"{engine.name} engine ready, {config.model.base}")
    # Collecting the objects of all libraries takes half a second, in which no request is answered, and finds nothing.
    gc.freeze()
    return engine


def open_backend(config: Config, environ: Mapping[str, str]) -> Backend:
    """Return the backend that runs jobs. Raises ConfigError if it cannot run as configured."""
    if config.jobs.backend == "local":
        return LocalBackend(config.jobs, {name: value for name, value in environ.items() if name != KEYS_VARIABLE})
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("'jobs.backend': ray is not installed; pip install 'hildanext[ray]', or use 'local'")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray's client prefers these over the address it is given
        if name in environ:
            raise ConfigError(
                f"'jobs.ray_address': the environment's {name}={environ[name]} overrides it; unset {name}"
            )
    from hildanext.jobs.ray import RayBackend

    return RayBackend(config.jobs, Path.cwd())


def open_jobs(config: Config) -> Jobs:
    """Open the jobs of `paths.runs`. Raises UsageError or StoreError if the database or the backend cannot be used."""
    runs = Path(config.paths.runs).absolute()
    runs.mkdir(parents=True, exist_ok=True)
    backend = open_backend(config, os.environ)
    return Jobs(Store(config.jobs.database or f"sqlite:///{runs / 'jobs.sqlite'}"), runs, config.jobs, backend)


def serve(config: Config) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM, then give running requests `server.drain_s` seconds to finish.

    Keys and port are checked before the model loads. Raises HildaError if the engine cannot be opened.
    """
    keys = read_keys(config.server, os.environ)
    failures: list[HildaError] = []
    with bind(config.server) as sock:

        def give_up(error: HildaError) -> None:
            failures.append(error)
            server.should_exit = True

        app = make_app(config, open_engine, keys, open_jobs(config), give_up)
        server = make_server(app, config.server.drain_s)
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        url = f"http://{host}:{config.server.port}"
        say(f"serving on {url} (API document: {url}/openapi.json); press Ctrl-C to stop")
        # uvicorn raises the signal again after it has stopped; without a handler that would end the process.
        with stop_on_signals() as signalled:
            server.run([sock])
    if failures:
        raise failures[0]
    engine = app.state.worker.engine  # None if the server was stopped while the model was loading
    return {"url": url, "engine": engine.name if engine else None, "stopped_by": signalled()}
