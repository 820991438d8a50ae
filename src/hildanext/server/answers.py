"""Building answers: error statuses, server-sent events, and stopping when the client disconnects."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from hildanext.decoding.engines import Completion, Engine, Event
from hildanext.decoding.events import Step
from hildanext.errors import HildaError, UsageError
from hildanext.jobs.store import ConflictError, MissingError, StoreError
from hildanext.server.worker import DeadlineError, NoBase, Overloaded, Ticket, Unready

RETRY_S = 1  # Retry-After where nothing says how long it will take
T = TypeVar("T")


class ClientGone(HildaError):
    """The client closed the connection."""


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
    400: "The request is invalid.",
    401: "The API key is missing or invalid.",
    403: "The Host or Origin header names another site.",
    404: "Not found.",
    409: "The job's current state does not allow this.",
    411: "Content-Length is missing, or Transfer-Encoding is set.",
    413: "The request body is too large.",
    422: "The request body does not match the schema.",
    429: "The queue is full; retry after the seconds in Retry-After.",
    500: "The engine or the server failed.",
    503: "The model is loading, the server is stopping, or the job database or the disk cannot be written.",
    504: "The deadline passed.",
}


def status_of(error: HildaError) -> int:
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route for the OpenAPI document."""
    return {status: {"model": Problem, "description": MEANINGS[status]} for status in statuses}


def streams(also: str) -> dict[str, Any]:
    """Describe a 200 answer that is either of media type `also` or a stream of server-sent events."""
    fields = {"event": {"type": "string"}, "data": {"type": "string"}}
    event = {"description": "Each event.", "type": "object", "properties": fields, "required": ["data"]}
    text = {also: {"schema": {"type": "string"}}} if also == "text/plain" else {}
    return {"content": {"text/event-stream": {"schema": event}, **text}}


def problem(status: int, line: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": line}, status, with_retry(status, headers))


def with_retry(status: int, headers: dict[str, str] | None = None) -> dict[str, str]:
    return ({"Retry-After": str(RETRY_S)} if status in (429, 503) else {}) | (headers or {})


def retry_after(error: HildaError) -> dict[str, str]:
    """Return the header that tells when to try again, where the error knows it."""
    return {"Retry-After": str(max(RETRY_S, math.ceil(error.wait_s)))} if isinstance(error, Overloaded) else {}


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`. If the client disconnects first, cancel it and raise ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client disconnected")
    finally:
        for future in (task, gone):
            future.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def together(works: list[Awaitable[T]]) -> list[T]:
    """Await all of `works`. If one fails, cancel the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def completed(events: AsyncIterator[list[Event]]) -> tuple[Completion, list[Step]]:
    """Read a request's events to the end; return its completion and all steps."""
    steps: list[Step] = []
    async for news in events:
        steps += [event for event in news if isinstance(event, Step)]
        if isinstance(news[-1], Completion):
            return news[-1], steps
    raise RuntimeError("a request's events ended without a completion")


async def merged(streams: list[AsyncIterator[list[T]]]) -> AsyncIterator[list[tuple[int, T]]]:
    """Yield the events of several requests as they come, each with the index of its request. The first error ends all."""
    waiting = {asyncio.ensure_future(anext(events)): index for index, events in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            news: list[tuple[int, T]] = []
            for task in done:
                index = waiting.pop(task)
                try:
                    news += [(index, event) for event in task.result()]
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
            if news:
                yield news
    finally:
        for task in waiting:
            task.cancel()


def start_event(ticket: Ticket) -> str:
    """Format the `start` event of a stream of /generate."""
    settings = ticket.request.settings.as_dict()
    return sse({"prompt_tokens": len(ticket.request.prompt_ids), "settings": settings}, "start")


def error_event(error: HildaError) -> str:
    """Format the `error` event that ends a stream."""
    return sse({"detail": str(error), "status": status_of(error)}, "error")


async def streamed(
    request: Request,
    events: AsyncIterator[list[T]],
    written: Callable[[T], str],
    *,
    head: str,
    failed: Callable[[HildaError], str] = error_event,
    tail: str = "",
) -> StreamingResponse:
    """Answer with a stream: `head`, `written(event)` for each event, `failed(error)` if the request fails, `tail`.

    The answer begins after the first event, so that an invalid request still gets an error status.
    """
    first = await unless_gone(request, anext(events))

    async def batches() -> AsyncIterator[list[T]]:
        yield first
        async for news in events:
            yield news

    async def chunks() -> AsyncIterator[str]:
        if head:
            yield head
        try:
            async for news in batches():
                if text := "".join(map(written, news)):  # one write per batch: each write holds up the engine's thread
                    yield text
        except HildaError as error:
            # The status 200 was already sent: the log and /metrics get the error from here.
            request.state.facts = {"error": type(error).__name__}
            yield failed(error)
        if tail:
            yield tail

    return event_stream(chunks())


def event_stream(chunks: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)


def sse(data: Any, event: str | None = None) -> str:
    """Format one server-sent event. Compact JSON contains no line breaks."""
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def make_show_step(engine: Engine) -> Callable[[Step], dict[str, Any]]:
    """Return a function that turns a step into JSON: its fields, `pieces`, each token's text alone (None: masked), and
    `dropped`, the text of each deleted token.

    The page lays these pieces along the completion's text; texts in context are `terminal.cells.token_texts`.
    """
    known: dict[int, str | None] = {engine.mask_token_id: None} if engine.mask_token_id is not None else {}

    def piece(token: int) -> str | None:
        if token not in known:
            known[token] = engine.decode_tokens([token])
        return known[token]

    return lambda step: (
        step._asdict()
        | {"pieces": [piece(t) for t in step.tokens], "dropped": [piece(t) or "" for _, t in step.deleted]}
    )
