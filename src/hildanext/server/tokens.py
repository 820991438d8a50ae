"""POST /tokenize and /detokenize, in the shapes of vLLM's server."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, model_validator

from hildanext.config import Config
from hildanext.decoding.engines import Engine, Prompt, Rendering
from hildanext.server.answers import problem, problems, unless_gone
from hildanext.server.bodies import NOTHING, ONE_PROMPT, Body, Text, Tolerant
from hildanext.server.native import check_prompt
from hildanext.server.openai_answers import model_id, unknown_line
from hildanext.server.openai_bodies import ChatMessage, rendering_of
from hildanext.server.structured import MOST_TOOLS, Tool, shown_tools
from hildanext.server.worker import Worker


class TokenizeBody(Tolerant):
    """A text, or messages to render with the chat template."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"enum": NOTHING}, **ONE_PROMPT})

    model: Text | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = Field(None, description="Put what the tokenizer adds before a text; true.")
    add_generation_prompt: bool | None = Field(None, description="End messages with the beginning of an answer; true.")
    continue_final_message: bool | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS, description="Functions to show with the messages.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of 'prompt' and 'messages'")
        self.rendering  # noqa: B018  (raises ValueError)
        return self

    @property
    def rendering(self) -> Rendering:
        found = rendering_of(self.messages or [], self.add_generation_prompt, self.continue_final_message)
        tools = shown_tools(self.tools) if self.tools else None
        return found._replace(add_special_tokens=self.add_special_tokens is not False, tools=tools)

    @property
    def text(self) -> Prompt:
        """The prompt in the form that `Engine.encode` takes."""
        return self.prompt if self.prompt is not None else [message.as_ours for message in self.messages or []]


class TokenizeAnswer(Body):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Tolerant):
    model: Text | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class DetokenizeAnswer(Body):
    prompt: str


def token_routes(config: Config, worker: Worker) -> APIRouter:
    router = APIRouter()
    known: dict[int | str, dict[str, Any]] = problems(400, 401, 403, 404, 411, 413, 422, 429, 500, 503, 504)

    def refusal(model: str | None) -> Response | None:
        return problem(404, unknown_line(model)) if model not in (None, model_id(config)) else None

    @router.post("/tokenize", responses={200: {"model": TokenizeAnswer}, **known})
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """Token ids of a text, or of messages as the model gets them."""
        if (refused := refusal(body.model)) is not None:
            return refused
        check_prompt(config, body.text, body.rendering.tools)

        def work(engine: Engine) -> tuple[list[int], list[str] | None]:
            ids = engine.encode(body.text, None, body.rendering)
            return ids, [engine.detokenize([token]) for token in ids] if body.return_token_strs else None

        ids, texts = await unless_gone(request, worker.aside(work))
        context = worker.opened().context
        return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts})

    @router.post("/detokenize", responses={200: {"model": DetokenizeAnswer}, **known})
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """The text of token ids, special tokens included."""
        if (refused := refusal(body.model)) is not None:
            return refused
        check_prompt(config, body.tokens)
        text = await unless_gone(request, worker.aside(lambda engine: engine.detokenize(body.tokens)))
        return JSONResponse({"prompt": text})

    return router
