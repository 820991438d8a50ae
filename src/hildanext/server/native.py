"""HildaNext's own routes: /health, /metrics and /generate."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hildanext import __version__
from hildanext.config import Config, DecodeConfig
from hildanext.decoding.engines import AS_USUAL, Completion, Engine, Event, Prompt, Rendering, is_dummy_chosen
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.grammar import Grammar
from hildanext.errors import UsageError
from hildanext.jobs.watcher import Jobs
from hildanext.server.answers import (
    completed,
    make_show_step,
    problem,
    problems,
    sse,
    start_event,
    streamed,
    streams,
    unless_gone,
)
from hildanext.server.bodies import GenerateBody, n_chars
from hildanext.server.meters import Meters
from hildanext.server.worker import Ticket, Worker


@dataclass(frozen=True)
class GenerateAnswer(Completion):
    """A completion. With `trace`, it includes every denoising step and the text of its tokens."""

    trace: list[dict[str, Any]] | None = None


class Asked(NamedTuple):
    """What a request asks of the engine."""

    prompt: Prompt
    decode: DecodeConfig
    rendering: Rendering = AS_USUAL
    grammar: Grammar | None = None  # which the answer must match
    fills_context: bool = False  # the answer may use what is left of the context, whatever decode.max_new_tokens
    deadline_s: float | None = None
    wants_steps: bool = False


def check_prompt(config: Config, prompt: Prompt, tools: list[dict[str, Any]] | None = None) -> None:
    """Raise UsageError for a prompt that is too long, with the tools that it shows."""
    size, limit = n_chars(prompt) + (len(json.dumps(tools)) if tools else 0), config.server.max_prompt_chars
    if size > limit:
        raise UsageError(f"the prompt has {size} characters; the limit is {limit} (server.max_prompt_chars)")


async def submit(worker: Worker, config: Config, asked: Asked) -> Ticket:
    """Submit a prompt to the engine. Raises UsageError if it or its answer is too long, and what `Worker.accept` does."""
    check_prompt(config, asked.prompt, asked.rendering.tools)
    most_tokens, decode = config.server.max_new_tokens, asked.decode
    if most_tokens is not None and decode.max_new_tokens > most_tokens:
        if decode.max_new_tokens != config.decode.max_new_tokens:
            line = f"an answer of {decode.max_new_tokens} tokens is above the limit of {most_tokens}"
            raise UsageError(f"{line} (server.max_new_tokens); ask for fewer")
        decode = decode.model_copy(update={"max_new_tokens": most_tokens})
    settings = worker.opened().settings(config.model_copy(update={"decode": decode}))
    most = config.server.deadline_s
    deadline_s = most if asked.deadline_s is None else min(asked.deadline_s, most)
    return await worker.accept(
        asked.prompt,
        settings,
        deadline_s,
        wants_steps=asked.wants_steps,
        rendering=asked.rendering,
        grammar=asked.grammar,
        fills_context=asked.fills_context,
    )


def native_routes(
    config: Config, worker: Worker, meters: Meters, jobs: Jobs | None, base_state: Callable[[], str]
) -> APIRouter:
    router = APIRouter()
    _add_views(router, config, worker, meters, jobs, base_state)
    _add_generate(router, config, worker)
    return router


def _add_views(
    router: APIRouter,
    config: Config,
    worker: Worker,
    meters: Meters,
    jobs: Jobs | None,
    base_state: Callable[[], str],
) -> None:
    began = time.monotonic()

    def status() -> str:
        if worker.state != "ready":
            return worker.state
        stands_in = worker.opened().name == "dummy" and not is_dummy_chosen(config)
        return "no model" if stands_in else "ok"

    @router.get("/health", responses=problems(401, 403))
    async def health() -> dict[str, Any]:
        """The engine, the reasons why other engines were passed over, and the current load."""
        return {
            "status": status(),
            "model": config.model.base,
            **_of_engine(worker.engine, config),
            "running": len(worker.accepted) - worker.n_queued,
            "queue": worker.n_queued,
            "queue_limit": config.server.queue,
            "base": base_state(),
            "jobs": {"backend": config.jobs.backend, "trouble": jobs.trouble} if jobs is not None else None,
            "uptime_s": time.monotonic() - began,
            "version": __version__,
        }

    @router.get("/health/live", responses=problems(403))
    async def live() -> dict[str, str]:
        """Liveness: the process answers."""
        return {"status": "live"}

    @router.get("/health/ready", responses=problems(403, 503))
    async def ready() -> Response:
        """Readiness: the model has answered once, and its last pass did not fail."""
        if status() == "no model":
            return problem(503, "no model is loaded, the dummy engine answers; /health has the reasons")
        if status() != "ok":
            return problem(503, f"the server is {worker.state}")
        return JSONResponse({"status": "ready"})

    @router.get(
        "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **problems(401, 403)}
    )
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _of_engine(engine: Engine | None, config: Config) -> dict[str, Any]:
    """What /health says of the engine; nulls while it loads."""
    settings = engine.settings(config) if engine else None
    return {
        "engine": engine.name if engine else None,
        "engine_reasons": engine.reasons if engine else {},
        "modes": engine.modes if engine else None,
        "mode": settings.mode if settings else None,
        "block_size": settings.block_size if settings else None,
        "device": engine.device if engine else None,
        "dtype": engine.dtype if engine else None,
        "policy": engine.policy if engine else None,
        "slots": engine.slots if engine else None,
    }


def _add_generate(router: APIRouter, config: Config, worker: Worker) -> None:
    @router.post(
        "/generate",
        responses={
            200: {"model": GenerateAnswer, **streams("application/json")},
            **problems(400, 401, 403, 411, 413, 422, 429, 500, 503, 504),
        },
    )
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Complete a prompt. A stream includes every denoising step as it happens."""
        decode, wants_steps = body.decode_config(config.decode), body.stream or body.trace
        grammar = None if body.json_schema is None else Grammar.of_schema(body.json_schema)
        asked = Asked(body.text, decode, grammar=grammar, deadline_s=body.deadline_s, wants_steps=wants_steps)
        ticket = await unless_gone(
            request,
            submit(worker, config, asked),
        )
        show = make_show_step(worker.opened())

        def written(event: Event) -> str:
            if isinstance(event, Step):
                return sse(show(event), "step")
            if isinstance(event, Finished):
                logprobs = None if event.logprobs is None else [asdict(item) for item in event.logprobs]
                return sse(event._asdict() | {"logprobs": logprobs}, "block")
            request.state.facts = facts(config, body.text, event)
            return sse(event.as_dict(), "done")

        if body.stream:
            return await streamed(request, worker.events(ticket), written, head=start_event(ticket))
        done, steps = await unless_gone(request, completed(worker.events(ticket)))
        request.state.facts = facts(config, body.text, done)
        return JSONResponse(done.as_dict() | ({"trace": [show(step) for step in steps]} if body.trace else {}))


def facts(config: Config, prompt: Prompt, done: Completion) -> dict[str, Any]:
    """Return the log fields of a completion: numbers, and its text if `server.log_prompts` is set."""
    numbers = {
        "tokens": len(done.token_ids),
        "tokens_per_forward": round(done.stats.tokens_per_forward, 2),
        "finish_reason": done.finish_reason,
    }
    return numbers | ({"prompt": prompt, "text": done.text} if config.server.log_prompts else {})
