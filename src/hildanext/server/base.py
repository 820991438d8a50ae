"""POST /generate/base: the AR base of the served checkpoint, to be looked at beside it. Loaded when first asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hildanext.config import Config
from hildanext.decoding.engines import Completion, Engine, Event
from hildanext.decoding.events import Finished, Step
from hildanext.errors import HildaError
from hildanext.server.answers import (
    chained,
    completed,
    event_stream,
    note_failure,
    problems,
    sse,
    status_of,
    streams,
    unless_gone,
)
from hildanext.server.bodies import BaseBody
from hildanext.server.meters import Meters
from hildanext.server.native import facts, submit
from hildanext.server.worker import DeadlineError, NoBase, Ticket, Worker


class BaseWorker:
    """The base's own worker. There is none until the first request; one that could not open is tried again."""

    def __init__(self, config: Config, open_base: Callable[[Config], Engine]) -> None:
        self.config, self.open_base = config, open_base
        self.worker: Worker | None = None

    @property
    def state(self) -> str:
        if not self.config.server.base:
            return "off"
        if self.worker is None:
            return "not loaded"
        return "failed" if self.worker.failure is not None else self.worker.state

    async def opened(self, deadline_s: float | None) -> Worker:
        """The worker, its engine open. Raises NoBase with the reason when there is no base, DeadlineError."""
        if not self.config.server.base:
            raise NoBase("server.base is off; set it to true and start the server again")
        if self.worker is None or self.worker.failure is not None:
            # Meters of its own: /metrics measures the served model.
            self.worker = Worker(self.config, self.open_base, Meters())
            self.worker.start(lambda: None)
        worker, limit = self.worker, self.config.server.deadline_s
        try:
            await asyncio.wait_for(worker.is_open.wait(), min(deadline_s or limit, limit))
        except asyncio.TimeoutError:
            raise DeadlineError("the deadline passed while the AR base was loading; try again") from None
        if worker.failure is not None:
            raise NoBase(f"no AR base: {worker.failure}")
        return worker

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()


def parent_routes(config: Config, parent: BaseWorker) -> APIRouter:
    router = APIRouter()

    async def begin(body: BaseBody) -> tuple[Worker, Ticket]:
        began, most = time.monotonic(), config.server.deadline_s
        worker = await parent.opened(body.deadline_s)
        left = min(body.deadline_s or most, most) - (time.monotonic() - began)
        decode = body.decode_config(config.decode)
        return worker, await submit(worker, config, body.text, decode, left, wants_steps=body.stream)

    @router.post(
        "/generate/base",
        responses={
            200: {"model": Completion, **streams("application/json")},
            **problems(400, 401, 403, 404, 411, 413, 422, 429, 500, 503, 504),
        },
    )
    async def generate_base(body: BaseBody, request: Request) -> Response:
        """Complete a prompt with the checkpoint's AR base, greedily; streamed, a token at a time."""
        worker, ticket = await unless_gone(request, begin(body))
        events = worker.events(ticket)
        if body.stream:
            first = await unless_gone(request, anext(events))
            return event_stream(_stream(request, config, body, ticket, chained(first, events)))
        done, _ = await unless_gone(request, completed(events))
        request.state.facts = facts(config, body.text, done)
        return JSONResponse(done.as_dict())

    return router


async def _stream(
    request: Request, config: Config, body: BaseBody, ticket: Ticket, events: AsyncIterator[list[Event]]
) -> AsyncIterator[str]:
    settings = ticket.request.settings
    yield sse({"prompt_tokens": len(ticket.request.prompt_ids), "settings": settings._asdict()}, "start")
    token: dict[str, Any] = {}

    def written(event: Event) -> str:
        nonlocal token
        if isinstance(event, Step):
            token = {"token": event.tokens[0], "confidence": event.confidence[0]}
            return ""
        if isinstance(event, Finished):
            return sse(token | {"text": event.text}, "token")
        request.state.facts = facts(config, body.text, event)
        return sse(event.as_dict(), "done")

    try:
        async for news in events:
            if text := "".join(map(written, news)):
                yield text
    except HildaError as error:
        note_failure(request, error)
        yield sse({"detail": str(error), "status": status_of(error)}, "error")
