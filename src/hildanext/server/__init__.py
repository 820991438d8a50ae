"""`serve`: an engine over HTTP. /health, /generate, /metrics and OpenAI's API; many requests side by side.

Loopback by default; any other address needs API keys, checked before a body is read.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from hildanext.config import Config, ServerConfig
from hildanext.decoding import engines
from hildanext.errors import ConfigError, HildaError
from hildanext.jobs.backend import Backend
from hildanext.jobs.local import LocalBackend
from hildanext.jobs.store import Store
from hildanext.jobs.watcher import Jobs
from hildanext.progress import say, stop_on_signals
from hildanext.server.app import make_app
from hildanext.server.guard import STALL_S
from hildanext.server.keys import KEYS_VARIABLE, read_keys

__all__ = ["make_app", "serve"]


def bind(server: ServerConfig) -> socket.socket:
    """A socket bound to the address, not listening yet. Raises ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    # TCP by name: only then does asyncio turn Nagle's algorithm off, which costs 40 ms on every kept connection.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # there it would take a port that is in use
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # what is closed while its client takes nothing would keep its last bytes for ever
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
    """The engine, said to people."""
    engine = engines.open_engine(config)
    for name, reason in engine.reasons.items():
        say(f"engine {name} passed over: {reason}")
    say(f"{engine.name} engine ready, {config.model.base}")
    return engine


def open_backend(config: Config, environ: Mapping[str, str]) -> Backend:
    """Where jobs run. Raises ConfigError where it cannot be as configured."""
    if config.jobs.backend == "local":
        return LocalBackend(config.jobs, {name: value for name, value in environ.items() if name != KEYS_VARIABLE})
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("'jobs.backend': ray is not installed; pip install 'hildanext[ray]', or use 'local'")
    for name in (
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
    ):  # Ray's client takes them for the address whatever it is given
        if name in environ:
            raise ConfigError(
                f"'jobs.ray_address': the environment's {name}={environ[name]} overrides it; unset {name}"
            )
    from hildanext.jobs.ray import RayBackend

    return RayBackend(config.jobs, Path.cwd())


def open_jobs(config: Config) -> Jobs:
    """The jobs of `paths.runs`. Raises UsageError or StoreError for a database or a backend that cannot be had."""
    runs = Path(config.paths.runs).absolute()
    runs.mkdir(parents=True, exist_ok=True)
    backend = open_backend(config, os.environ)
    return Jobs(Store(config.jobs.database or f"sqlite:///{runs / 'jobs.sqlite'}"), runs, config.jobs, backend)


def serve(config: Config) -> dict[str, Any]:
    """Answer until SIGINT or SIGTERM; requests under way get `server.drain_s` to finish.

    Keys and port are checked before anything loads. Raises HildaError when the engine cannot be opened.
    """
    keys = read_keys(config.server, os.environ)
    failures: list[HildaError] = []
    with bind(config.server) as sock:

        def give_up(error: HildaError) -> None:
            failures.append(error)
            server.should_exit = True

        app = make_app(config, open_engine, keys, open_jobs(config), give_up)
        # Access lines would go to stdout, which carries the result only.
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=config.server.drain_s
        )
        server = uvicorn.Server(settings)
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        url = f"http://{host}:{config.server.port}"
        say(f"{url} (API: {url}/openapi.json); stop with Ctrl-C")
        # uvicorn gives a signal back when it has stopped, which would end the process with that signal's code.
        with stop_on_signals() as signalled:
            server.run([sock])
    if failures:
        raise failures[0]
    engine = app.state.worker.engine  # None: stopped before it was loaded
    return {"url": url, "engine": engine.name if engine else None, "stopped_by": signalled()}
