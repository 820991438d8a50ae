"""OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions. Clients send mode and thresholds in `extra_body`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from hildanext.config import Config, DecodeConfig, Mode, changed_settings
from hildanext.config.decoding import Lookup, RepetitionPenalty, Seed, Share, TauAccept, Temperature, TopK, TopP
from hildanext.decoding.engines import Completion, Event
from hildanext.decoding.events import Finished
from hildanext.errors import ContextError, HildaError
from hildanext.server.answers import completed, sse, status_of, streamed, streams, together, unless_gone, with_retry
from hildanext.server.bodies import NULL_MEANS_OFF, Body, Stop, Text
from hildanext.server.native import facts, submit
from hildanext.server.structured import FREE, AnswerReader, ResponseFormat, Structure, Tool, ToolChoice, structure
from hildanext.server.worker import Ticket, Worker

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {411: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error"}

CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class OpenAIProblemInner(Body):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(Body):
    error: OpenAIProblemInner


def error_body(status: int, line: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": line, "type": kind, "param": param, "code": code or CODES.get(status)}}


def openai_problem(
    status: int,
    line: str,
    param: str | None = None,
    headers: dict[str, str] | None = None,
    code: str | None = None,
) -> Response:
    """Build an error answer. OpenAI's API uses 400 where others use 422."""
    status = 400 if status == 422 else status
    return JSONResponse(error_body(status, line, param, code), status, with_retry(status, headers))


def code_of(error: HildaError) -> str | None:
    """Return OpenAI's error code where it says more than the status."""
    return "context_length_exceeded" if isinstance(error, ContextError) else None


class StreamOptions(Body):
    include_usage: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @property
    def as_ours(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class OpenAIBody(Body):
    """Fields of both endpoints. An omitted setting takes the server's value, as in POST /generate."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = Field(None, description="null or omitted: the server's seed, or a new one for each prompt.")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    user: Text | None = Field(None, description="Accepted and ignored.")
    # OpenAI's clients send these in `extra_body`:
    mode: Mode | None = None
    tau_mask: Share | None = None
    tau_edit: Share | None = Field(None, description="null turns editing off; omitted: the preset's value.")
    tau_accept: TauAccept | None = Field(
        None, description="Gated checkpoints; null edits blocks instead; omitted: the preset's value."
    )
    lookup: Lookup | None = Field(None, description="Also draft from the text so far; null turns it off.")
    top_k: TopK | None = None
    repetition_penalty: RepetitionPenalty | None = None
    # Not supported: only the value that turns the feature off is accepted.
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(None, ge=0.0, le=0.0)
    presence_penalty: float | None = Field(None, ge=0.0, le=0.0)

    @property
    def wanted(self) -> Structure:
        """The grammar and the tools that the request asks for."""
        return FREE

    def decode_config(self, base: DecodeConfig, max_new_tokens: int | None) -> DecodeConfig:
        names = ("temperature", "top_p", "seed", "mode", "tau_mask", "top_k", "repetition_penalty")
        given: dict[str, Any] = {name: value for name, value in self if name in names and value is not None}
        given |= {name: getattr(self, name) for name in NULL_MEANS_OFF if name in self.model_fields_set}
        if max_new_tokens is not None:
            given["max_new_tokens"] = max_new_tokens
        if self.stop is not None:
            given["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return base.model_copy(update=changed_settings(given))


class CompletionBody(OpenAIBody):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_stream(self) -> CompletionBody:
        if self.stream and len(self.prompts) > 1:
            raise ValueError("a stream takes exactly one prompt")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ChatBody(OpenAIBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = Field(None, description="null or omitted: 'auto'.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call.")

    @property
    def wanted(self) -> Structure:
        return structure(self.response_format, self.tools, self.tool_choice, self.parallel_tool_calls)


def model_id(config: Config) -> str:
    """Return the served model's name: a hub name unchanged, or the last part of a path."""
    return Path(config.model.base).name if Path(config.model.base).exists() else config.model.base


def usage(n_prompt: int, done: list[Completion]) -> dict[str, Any]:
    n_completion = sum(len(completion.token_ids) for completion in done)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": sum(completion.stats.prefix_tokens for completion in done)},
    }


class Form:
    """The JSON of an answer, as /v1/chat/completions (`chat`) or /v1/completions writes it."""

    def __init__(self, config: Config, *, chat: bool, calls: bool = False) -> None:
        """calls: tool calls are read from the text."""
        self.chat, self.calls, self.model = chat, calls, model_id(config)
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def reader(self) -> AnswerReader:
        """Reads the text of a new answer."""
        return AnswerReader(calls=self.calls)

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            reader = self.reader()
            reader.push(text, last=True)
            content, finish_reason = {"message": reader.message}, reader.finish_reason(finish_reason)
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def chunk(self, delta: dict[str, Any], done: Completion | None = None, finish_reason: str | None = None) -> str:
        """A chunk of a stream; `done` makes it the last one, with the extension `hildanext`."""
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        more = {} if done is None else self.extension([done])
        return sse(self.head(chunk=True) | {"choices": [choice]} | more)

    def extension(self, done: list[Completion]) -> dict[str, Any]:
        """What OpenAI's format has no place for: the engine, the mode, and the stats with the seed."""
        return {"hildanext": [{"engine": item.engine, "mode": item.mode, "stats": asdict(item.stats)} for item in done]}

    def answer(self, done: list[Completion], n_prompt: int) -> dict[str, Any]:
        return self.head(chunk=False) | {
            "choices": [self.choice(index, item.text, item.finish_reason) for index, item in enumerate(done)],
            "usage": usage(n_prompt, done),
            **self.extension(done),
        }


def openai_routes(config: Config, worker: Worker) -> APIRouter:
    router = APIRouter(prefix="/v1")
    statuses = (400, 401, 403, 404, 411, 413, 429, 500, 503, 504)
    known: dict[int | str, dict[str, Any]] = {status: {"model": OpenAIProblem} for status in statuses}
    answers = known | {200: streams("application/json")}
    began = int(time.time())

    def shown() -> dict[str, Any]:
        return {"id": model_id(config), "object": "model", "created": began, "owned_by": "hildanext"}

    @router.get("/models", responses={401: known[401], 403: known[403]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [shown()]}

    @router.get("/models/{name:path}", responses={401: known[401], 403: known[403], 404: known[404]})
    async def model(name: str) -> Any:
        return shown() if name == model_id(config) else unknown_model(name)

    async def answer(
        request: Request, body: OpenAIBody, prompts: list[Any], decode: DecodeConfig, *, chat: bool
    ) -> Response:
        if body.model != model_id(config):
            return unknown_model(body.model)
        wanted = body.wanted
        form = Form(config, chat=chat, calls=wanted.tools is not None)
        tickets: list[Ticket] = []
        try:
            for prompt in prompts:
                tickets.append(await unless_gone(request, submit(worker, config, prompt, decode, wanted=wanted)))
            if body.stream:
                head = form.chunk({"role": "assistant", "content": ""}) if chat else ""
                written = _chunks(request, config, body, prompts[0], tickets[0], form)
                return await streamed(
                    request, worker, tickets[0], written, head=head, failed=_failed, tail="data: [DONE]\n\n"
                )
            found = await unless_gone(request, together([completed(worker.events(t)) for t in tickets]))
        except BaseException:
            for ticket in tickets:
                worker.drop(ticket)
            raise
        done = [completion for completion, _ in found]
        request.state.facts = facts(config, prompts[0], done[0])
        return JSONResponse(form.answer(done, sum(len(ticket.request.prompt_ids) for ticket in tickets)))

    @router.post("/completions", responses=answers)
    async def completions(body: CompletionBody, request: Request) -> Any:
        decode = body.decode_config(config.decode, body.max_tokens)
        return await answer(request, body, list(body.prompts), decode, chat=False)

    @router.post("/chat/completions", responses=answers)
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        decode = body.decode_config(config.decode, body.max_completion_tokens or body.max_tokens)
        messages = [message.as_ours for message in body.messages]
        return await answer(request, body, [messages], decode, chat=True)

    return router


def unknown_model(name: str) -> Response:
    line = f"model '{name}' is not served here; GET /v1/models lists the served model"
    return openai_problem(404, line, "model", code="model_not_found")


def _failed(error: HildaError) -> str:
    return sse(error_body(status_of(error), str(error), code=code_of(error)))


def _chunks(
    request: Request,
    config: Config,
    body: OpenAIBody,
    prompt: str | list[dict[str, str]],
    ticket: Ticket,
    form: Form,
) -> Callable[[Event], str]:
    """Return a function that writes chunks for each finished block, and the last chunks for the completion."""
    reader = form.reader()

    def written(event: Event) -> str:
        if isinstance(event, Finished):
            return "".join(form.chunk(delta) for delta in reader.push(event.text))
        if not isinstance(event, Completion):
            return ""
        request.state.facts = facts(config, prompt, event)
        last = "".join(form.chunk(delta) for delta in reader.push("", last=True))
        last += form.chunk({}, event, reader.finish_reason(event.finish_reason))
        if body.stream_options is not None and body.stream_options.include_usage:
            tokens = usage(len(ticket.request.prompt_ids), [event])
            last += sse(form.head(chunk=True) | {"choices": [], "usage": tokens})
        return last

    return written
