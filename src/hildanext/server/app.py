"""The FastAPI application: all routes, the guard in front of them and the error handlers, around one worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from hildanext import __version__
from hildanext.config import Config
from hildanext.decoding import engines
from hildanext.decoding.engines import Engine
from hildanext.errors import HildaError
from hildanext.jobs.store import STATES
from hildanext.jobs.watcher import Jobs
from hildanext.server.answers import problem, problems, retry_after, status_of
from hildanext.server.base import BaseWorker, base_routes
from hildanext.server.defaults import defaults_routes
from hildanext.server.document import describe_keys
from hildanext.server.guard import Guard
from hildanext.server.jobs import job_routes
from hildanext.server.meters import Meters
from hildanext.server.native import native_routes
from hildanext.server.openai import openai_routes
from hildanext.server.openai_answers import OpenAIProblem, code_of, openai_problem
from hildanext.server.page import page_routes
from hildanext.server.tokens import token_routes
from hildanext.server.worker import Worker

BODY_BYTES_PER_CHAR = 12  # JSON may escape one character as two units of six bytes
BODY_BYTES_BESIDE = 65_536  # for keys, numbers and the brackets around messages


def make_app(
    config: Config,
    open_engine: Callable[[Config], Engine],
    keys: list[bytes],
    jobs: Jobs | None = None,
    on_failure: Callable[[HildaError], object] = lambda error: None,
    open_base: Callable[..., Engine] = engines.open_base,
) -> FastAPI:
    """Build the application. The engine opens in the background at startup; a failure is passed to `on_failure`.

    `open_base` opens the AR base at the first request to /generate/base. Without `jobs`, /jobs does not exist.
    """
    meters = Meters()
    worker = Worker(config, open_engine, meters)
    base = BaseWorker(config, partial(open_base, threads=engines.n_threads()), worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start(lambda: on_failure(worker.failure) if worker.failure is not None else None)
        if jobs is not None:
            jobs.start()
        yield
        await asyncio.to_thread(worker.stop)
        await asyncio.to_thread(base.stop)
        if jobs is not None:
            await asyncio.to_thread(jobs.stop)

    app = FastAPI(title="HildaNext", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.include_router(native_routes(config, worker, meters, jobs, lambda: base.state), responses=problems(422))
    app.include_router(base_routes(config, base), responses=problems(422))
    app.include_router(defaults_routes(config, worker), responses=problems(422))
    app.include_router(page_routes())
    app.include_router(openai_routes(config, worker), responses={422: {"model": OpenAIProblem}})
    app.include_router(token_routes(config, worker), responses=problems(422))
    if jobs is not None:
        app.include_router(job_routes(config, worker, jobs), responses=problems(422))
        for state in STATES:
            meters.jobs.labels(state).set_function(partial(jobs.counts_of, state))
    app.add_middleware(
        Guard,
        keys=keys,
        most_bytes=config.server.max_prompt_chars * BODY_BYTES_PER_CHAR + BODY_BYTES_BESIDE,
        meters=meters,
        refuse=_refuse,
        origins=config.server.cors_origins,
    )
    if config.server.cors_origins:  # outside the guard: a browser asks first, and without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if keys:
        describe_keys(app)
    _answer_errors(app, meters)
    return app


def _answer_errors(app: FastAPI, meters: Meters) -> None:
    """Answer every error with one line, in the format of the API that was called."""

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        line, key = _validation_line(error)
        return _refuse(request.url.path, 422, line, {}, key)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette lists the methods of one matching route only
            matching = [route for route in app.routes if route.matches(request.scope)[0] != Match.NONE]
            methods = {method for route in matching if isinstance(route, Route) for method in route.methods or ()}
            headers["Allow"] = ", ".join(sorted(methods))
        return _refuse(request.url.path, error.status_code, str(error.detail), headers)

    @app.exception_handler(HildaError)
    async def refused(request: Request, error: HildaError) -> Response:
        meters.errors.labels(type(error).__name__).inc()
        return _refuse(request.url.path, status_of(error), str(error), retry_after(error), code=code_of(error))

    @app.exception_handler(OSError)
    async def no_disk(request: Request, error: OSError) -> Response:
        meters.errors.labels("OSError").inc()
        return _refuse(request.url.path, 503, error.strerror or "a file could not be written", {})


def _refuse(
    path: str,
    status: int,
    line: str,
    headers: dict[str, str],
    param: str | None = None,
    code: str | None = None,
) -> Response:
    # The line may quote the request. JSON can contain lone surrogates, which cannot be encoded in the answer.
    line = line.encode(errors="replace").decode()
    param = param and param.encode(errors="replace").decode()
    if path.startswith("/v1/"):
        return openai_problem(status, line, param, headers, code)
    return problem(status, line, headers)


def _validation_line(error: RequestValidationError) -> tuple[str, str | None]:
    """Return the body's first problem as one line, and its key.

    A field of several types has a problem for each of them: those that lie deepest count. The input is not repeated: it
    may be long, and NaN is not valid JSON.
    """
    found = [(_named(each, error.body), each) for each in error.errors()]
    same_field = [(named, each) for named, each in found if named[:1] == found[0][0][:1]]
    deepest = max((named for named, _ in same_field), key=len)
    reasons = dict.fromkeys(_reason(each) for named, each in same_field if named == deepest)
    key, line = ".".join(deepest), "; or ".join(reasons)
    # A check of several fields names its own.
    return (line if not key and line.startswith("'") else f"'{key or 'body'}': {line}"), key or None


def _named(problem_of: dict[str, Any], body: Any) -> tuple[str, ...]:
    """The keys of a problem's place, without pydantic's names for the types of a field."""
    place = problem_of["loc"]
    if problem_of["type"] == "json_invalid":  # a byte offset, not a key
        return ()
    if place[0] != "body":
        return tuple(str(part) for part in place[1:])
    keys: list[str] = []
    for part in place[1:]:
        is_key = isinstance(body, dict) and part in body
        is_index = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_key or is_index:
            body = body[part]
        elif problem_of["type"] != "missing" or part != place[-1]:
            continue
        keys.append(str(part))
    return tuple(keys)


REASONS = {
    "extra_forbidden": "Extra inputs are not permitted; remove the field, or check its name",
    "model_type": "Input should be a JSON object",
    "model_attributes_type": "Input should be a JSON object",
    "dict_type": "Input should be a JSON object",
}


def _reason(problem_of: dict[str, Any]) -> str:
    return REASONS.get(problem_of["type"], problem_of["msg"].removeprefix("Value error, "))
