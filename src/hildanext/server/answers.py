"""From events to bytes: errors, server-sent events, and a client that goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from hildanext.decoding.engines import Completion, Engine, Event
from hildanext.decoding.events import Step
from hildanext.errors import HildaError, UsageError
from hildanext.jobs.store import ConflictError, MissingError, StoreError
from hildanext.server.worker import DeadlineError, NoBase, Overloaded, Unready

RETRY_S = 1  # a slot is free again within about as much
T = TypeVar("T")


class ClientGone(HildaError):
    """The client closed the connection: nobody reads the answer."""


class Problem(BaseModel):
    detail: str


STATUSES: dict[type[HildaError], int] = {
    UsageError: 400,
    Overloaded: 429,
    MissingError: 404,
    NoBase: 404,
    ConflictError: 409,
    ClientGone: 499,
    Unready: 503,
    StoreError: 503,
    DeadlineError: 504,
}
MEANINGS = {
    400: "The request cannot be answered as it is.",
    401: "No valid API key.",
    403: "The Host or Origin header is another site's.",
    404: "There is no such thing.",
    409: "Not possible in the present state.",
    411: "POST without Content-Length, or with a Transfer-Encoding.",
    413: "The body is too long.",
    422: "The body does not fit the schema.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "The engine failed, or the server.",
    503: "The model is loading, the server is stopping, or the jobs' database or disk cannot be written.",
    504: "The deadline passed.",
}


def status_of(error: HildaError) -> int:
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route, for the OpenAPI document."""
    return {status: {"model": Problem, "description": MEANINGS[status]} for status in statuses}


def streams(also: str) -> dict[str, Any]:
    """The 200 of a route that answers at once, as `also`, or with server-sent events."""
    text = {"schema": {"type": "string"}}
    return {"content": {"text/event-stream": text, **({also: text} if also == "text/plain" else {})}}


def problem(status: int, line: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": line}, status, with_retry(status, headers))


def with_retry(status: int, headers: dict[str, str] | None = None) -> dict[str, str]:
    return (headers or {}) | ({"Retry-After": str(RETRY_S)} if status in (429, 503) else {})


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client went away")
    finally:
        for future in (task, gone):
            future.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def together(works: list[Awaitable[T]]) -> list[T]:
    """All results; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def completed(events: AsyncIterator[list[Event]]) -> tuple[Completion, list[Step]]:
    """Run a request to its end: the completion and every step."""
    steps: list[Step] = []
    async for news in events:
        steps += [event for event in news if isinstance(event, Step)]
        if isinstance(news[-1], Completion):
            return news[-1], steps
    raise RuntimeError("a request's events ended without a completion")


async def chained(first: list[Event], rest: AsyncIterator[list[Event]]) -> AsyncIterator[list[Event]]:
    yield first
    async for news in rest:
        yield news


def event_stream(chunks: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)


def note_failure(request: Request, error: HildaError) -> None:
    """For the log and /metrics: an answer that had begun, so that its status is 200, ends with an error."""
    request.state.facts = {"error": type(error).__name__}


def sse(data: Any, event: str | None = None) -> str:
    """One server-sent event. JSON has no line break of its own."""
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def make_show_step(engine: Engine) -> Callable[[Step], dict[str, Any]]:
    """A step as clients see it: besides ids the text of each token, None where it is masked."""
    known: dict[int, str | None] = {engine.mask_token_id: None} if engine.mask_token_id is not None else {}

    def piece(token: int) -> str | None:
        if token not in known:
            known[token] = engine.decode_tokens([token])
        return known[token]

    return lambda step: step._asdict() | {"pieces": [piece(token) for token in step.tokens]}
