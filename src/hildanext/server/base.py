"""POST /generate/base: the AR base of the served checkpoint, for comparison. It loads at the first request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hildanext.config import Config
from hildanext.decoding.engines import Completion, Engine, Event
from hildanext.decoding.events import Finished, Step
from hildanext.server.answers import completed, problems, sse, start_event, streamed, streams, unless_gone
from hildanext.server.bodies import BaseBody
from hildanext.server.meters import Meters
from hildanext.server.native import Asked, facts, submit
from hildanext.server.worker import DeadlineError, NoBase, Ticket, Worker

# Settings of a gated checkpoint that give its base's own text, one token a pass.
TOKEN_BY_TOKEN = {"mode": "EXACT", "tau_accept": 1.0, "rows": 1, "lookup": None, "temperature": 0.0, "logprobs": None}
TOKEN_BY_TOKEN |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}}


class BaseWorker:
    """The worker of the AR base. The first request creates it; after a failure the next request tries again.

    A gated checkpoint contains its base: its own worker, `served`, answers.
    """

    def __init__(self, config: Config, open_base: Callable[[Config], Engine], served: Worker) -> None:
        self.config, self.open_base, self.served = config, open_base, served
        self.worker: Worker | None = None

    @property
    def is_served(self) -> bool:
        """Whether the served model contains its base."""
        return self.served.engine is not None and self.served.engine.has_base

    @property
    def state(self) -> str:
        if not self.config.server.base:
            return "off"
        if self.is_served:
            return self.served.state
        if self.worker is None:
            return "not loaded"
        return "failed" if self.worker.failure is not None else self.worker.state

    async def opened(self, deadline_s: float | None) -> Worker:
        """Return the worker with its engine open.

        Raises NoBase with the reason if the base is not available, DeadlineError if loading takes too long.
        """
        if not self.config.server.base:
            raise NoBase("server.base is false; set it to true and restart the server")
        if self.is_served:
            return self.served
        if self.worker is None or self.worker.failure is not None:
            # Separate meters: /metrics describes the served model only.
            self.worker = Worker(self.config, self.open_base, Meters())
            self.worker.start(lambda: None)
        worker, limit = self.worker, self.config.server.deadline_s
        try:
            await asyncio.wait_for(worker.is_open.wait(), min(deadline_s or limit, limit))
        except asyncio.TimeoutError:
            raise DeadlineError("the deadline passed while the AR base was loading; try again") from None
        if worker.failure is not None:
            raise NoBase(f"the AR base is not available: {worker.failure}")
        return worker

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()


def base_routes(config: Config, base: BaseWorker) -> APIRouter:
    router = APIRouter()

    async def begin(body: BaseBody) -> tuple[Worker, Ticket]:
        began, most = time.monotonic(), config.server.deadline_s
        worker = await base.opened(body.deadline_s)
        left = min(body.deadline_s or most, most) - (time.monotonic() - began)
        decode = body.decode_config(config.decode)
        if worker is base.served:
            decode = decode.model_copy(update=TOKEN_BY_TOKEN)
        return worker, await submit(worker, config, Asked(body.text, decode, deadline_s=left, wants_steps=body.stream))

    @router.post(
        "/generate/base",
        responses={
            200: {"model": Completion, **streams("application/json")},
            **problems(400, 401, 403, 404, 411, 413, 422, 429, 500, 503, 504),
        },
    )
    async def generate_base(body: BaseBody, request: Request) -> Response:
        """Complete a prompt greedily with the AR base of the checkpoint. A stream sends each token."""
        worker, ticket = await unless_gone(request, begin(body))
        if body.stream:
            return await streamed(
                request, worker.events(ticket), token_events(request, config, body), head=start_event(ticket)
            )
        done, _ = await unless_gone(request, completed(worker.events(ticket)))
        request.state.facts = facts(config, body.text, done)
        return JSONResponse(done.as_dict())

    return router


def token_events(request: Request, config: Config, body: BaseBody) -> Callable[[Event], str]:
    """Return a function that writes a `token` event for each token, its text once final, and `done` at the end."""
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

    return written
