"""The application: routes, guard and errors around a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from hildanext import __version__
from hildanext.config import Config
from hildanext.engines import Engine
from hildanext.errors import HildaError
from hildanext.jobs.local import LocalJobs
from hildanext.jobs.store import STATES
from hildanext.server.answers import problem, status_of
from hildanext.server.guard import Guard
from hildanext.server.jobs import job_routes
from hildanext.server.meters import Meters
from hildanext.server.native import native_routes
from hildanext.server.openai import openai_problem, openai_routes
from hildanext.server.worker import Worker

BODY_BYTES_PER_CHAR = 12  # JSON may write a character as two escapes of six bytes
BODY_BYTES_BESIDE = 65_536  # keys, numbers, and the messages' own brackets


def make_app(
    config: Config,
    open_engine: Callable[[Config], Engine],
    keys: list[bytes],
    jobs: LocalJobs | None = None,
    on_failure: Callable[[HildaError], object] = lambda error: None,
) -> FastAPI:
    """The application. The engine opens in the background when it starts; `on_failure` hears when it cannot.

    Without `jobs` there is no /jobs.
    """
    meters = Meters()
    worker = Worker(config, open_engine, meters)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start(lambda: on_failure(worker.failure) if worker.failure is not None else None)
        if jobs is not None:
            jobs.start()
        yield
        await asyncio.to_thread(worker.stop)
        if jobs is not None:
            await asyncio.to_thread(jobs.stop)

    app = FastAPI(title="HildaNext", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.include_router(native_routes(config, worker, meters))
    app.include_router(openai_routes(config, worker))
    if jobs is not None:
        app.include_router(job_routes(config, worker, jobs))
        for state in STATES:
            meters.jobs.labels(state).set_function(partial(jobs.counts_of, state))
    app.add_middleware(
        Guard,
        keys=keys,
        most_bytes=config.server.max_prompt_chars * BODY_BYTES_PER_CHAR + BODY_BYTES_BESIDE,
        meters=meters,
        refuse=_refuse,
    )

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        line, key = _validation_line(error)
        return _refuse(request.url.path, 422, line, {}, key)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return _refuse(request.url.path, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(HildaError)
    async def refused(request: Request, error: HildaError) -> Response:
        meters.errors.labels(type(error).__name__).inc()
        return _refuse(request.url.path, status_of(error), str(error), {})

    @app.exception_handler(OSError)
    async def no_disk(request: Request, error: OSError) -> Response:
        meters.errors.labels("OSError").inc()
        return _refuse(request.url.path, 503, error.strerror or "a file could not be written", {})

    return app


def _refuse(path: str, status: int, line: str, headers: dict[str, str], param: str | None = None) -> Response:
    if path.startswith("/v1/"):
        return openai_problem(status, line, param, headers)
    return problem(status, line, headers)


def _validation_line(error: RequestValidationError) -> tuple[str, str | None]:
    """First problem of a body as one line, and its key. The input is not echoed: it may be long, and NaN has no JSON."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"][1:])
    return f"'{key or 'body'}': {first['msg'].removeprefix('Value error, ')}", key or None
