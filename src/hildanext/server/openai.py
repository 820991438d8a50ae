"""OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions. Clients send mode and thresholds in `extra_body`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hildanext.config import Config
from hildanext.decoding.engines import AS_USUAL, Completion, Event, Prompt
from hildanext.decoding.events import Finished
from hildanext.errors import UsageError
from hildanext.server.answers import completed, merged, sse, streamed, streams, together, unless_gone
from hildanext.server.native import Asked, facts, submit
from hildanext.server.openai_answers import Form, OpenAIProblem, error_chunk, model_id, unknown_model, usage
from hildanext.server.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from hildanext.server.structured import Structure
from hildanext.server.worker import Ticket, Worker

STATUSES = (400, 401, 403, 404, 411, 413, 429, 500, 503, 504)


def openai_routes(config: Config, worker: Worker) -> APIRouter:
    router = APIRouter(prefix="/v1")
    known: dict[int | str, dict[str, Any]] = {status: {"model": OpenAIProblem} for status in STATUSES}
    answers = known | {200: streams("application/json")}
    began = int(time.time())

    def shown() -> dict[str, Any]:
        context = worker.engine.context if worker.engine else None
        owner = {"object": "model", "created": began, "owned_by": "hildanext"}
        return {"id": model_id(config), **owner, "max_model_len": context}

    @router.get("/models", responses={401: known[401], 403: known[403]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [shown()]}

    @router.get("/models/{name:path}", responses={401: known[401], 403: known[403], 404: known[404]})
    async def model(name: str) -> Any:
        return shown() if name == model_id(config) else unknown_model(name)

    @router.post("/completions", responses=answers)
    async def completions(body: CompletionBody, request: Request) -> Any:
        def before() -> list[str]:
            engine = worker.opened()
            return [p if isinstance(p, str) else engine.detokenize(p) for p in body.prompts]

        return await answer(request, config, worker, body, list(body.prompts), before if body.echo else None)

    @router.post("/chat/completions", responses=answers)
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        messages = [message.as_ours for message in body.messages]
        return await answer(request, config, worker, body, [messages], None)

    return router


async def answer(
    request: Request,
    config: Config,
    worker: Worker,
    body: OpenAIBody,
    prompts: list[Prompt],
    before: Callable[[], list[str]] | None,
) -> Response:
    """Complete each prompt `n` times. before: gives the text in front of the answers to each prompt (`echo`)."""
    if body.model != model_id(config):
        return unknown_model(body.model)
    engine, n = worker.opened(), body.n or 1
    if n > engine.slots:
        raise UsageError(f"'n': {n} is above the {engine.slots} answers decoded side by side (engine.slots); lower it")
    echoed = before() if before else [""] * len(prompts)
    before_each, wanted = [text for text in echoed for _ in range(n)], body.wanted
    calls = wanted.tools is not None
    form = Form(config, engine.detokenize, before_each, chat=isinstance(body, ChatBody), calls=calls)
    tickets: list[Ticket] = []
    try:
        for prompt in prompts:
            for asked in _choices(config, body, wanted, prompt, n):
                tickets.append(await unless_gone(request, submit(worker, config, asked)))
        lengths = [len(ticket.request.prompt_ids) for ticket in tickets[::n]]
        if body.stream:
            written = _chunks(request, config, body, prompts, lengths, form)
            events = merged([worker.events(ticket) for ticket in tickets])
            head = _heads(form)
            return await streamed(request, events, written, head=head, failed=error_chunk, tail="data: [DONE]\n\n")
        found = await unless_gone(request, together([completed(worker.events(ticket)) for ticket in tickets]))
    except BaseException:
        for ticket in tickets:
            worker.drop(ticket)
        raise
    done = [completion for completion, _ in found]
    request.state.facts = facts(config, prompts[0], done[0])
    return JSONResponse(form.answer(done, lengths))


def _choices(config: Config, body: OpenAIBody, wanted: Structure, prompt: Prompt, n: int) -> list[Asked]:
    """What to submit for the `n` answers to a prompt. Each has a seed of its own, as in vLLM."""
    decode = body.decode_config(config.decode)
    rendering = (body.rendering if isinstance(body, ChatBody) else AS_USUAL)._replace(tools=wanted.tools)
    seeds = [None if decode.seed is None else (decode.seed + i) % 2**63 for i in range(n)]
    fills = body.most_tokens is None
    return [
        Asked(prompt, decode.model_copy(update={"seed": seed}), rendering, wanted.grammar, fills_context=fills)
        for seed in seeds
    ]


def _heads(form: Form) -> str:
    """The chunks before the first token: the role, or the prompt that is echoed."""
    if form.chat:
        return "".join(form.chunk(i, {"role": "assistant", "content": ""}) for i in range(len(form.before)))
    return "".join(form.chunk(i, {"content": text}) for i, text in enumerate(form.before) if text)


def _chunks(
    request: Request, config: Config, body: OpenAIBody, prompts: list[Prompt], lengths: list[int], form: Form
) -> Callable[[tuple[int, Event]], str]:
    """Return a function that writes the chunks of each finished block of a choice, and the last chunks."""
    done: dict[int, Completion] = {}
    n = len(form.before) // len(prompts)

    def written(news: tuple[int, Event]) -> str:
        index, event = news
        if isinstance(event, Finished):
            return form.block(index, event)
        if not isinstance(event, Completion):
            return ""
        done[index] = event
        request.state.facts = facts(config, prompts[index // n], event)
        last = form.end(index, event)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        if wants_usage and len(done) == len(form.before):
            last += sse(
                form.head(chunk=True) | {"choices": [], "usage": usage(lengths, [done[i] for i in sorted(done)])}
            )
        return last

    return written
