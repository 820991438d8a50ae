"""Answers of OpenAI's API: errors, choices with their log-probabilities, chunks of a stream, and usage."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from hildanext.config import Config
from hildanext.decoding.engines import Completion
from hildanext.decoding.events import Finished, TokenLogprob
from hildanext.errors import ContextError, HildaError
from hildanext.server.answers import sse, status_of, with_retry
from hildanext.server.bodies import Body
from hildanext.server.structured import AnswerReader

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {411: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error"}

CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
NAMED = re.compile(r"'([a-z_][a-z_.0-9]*)': ")  # a line that begins with the name of a field


class OpenAIProblemInner(Body):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(Body):
    error: OpenAIProblemInner


def error_body(status: int, line: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's format. A line that begins with a field's name also gives `param`."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if code == "context_length_exceeded":  # the words by which clients know it, and OpenAI's name of the setting
        line = "this model's maximum context length is exceeded: " + line.replace("max_new_tokens", "max_tokens")
    named = NAMED.match(line)
    if named and named[1] != "body" and status < 500:
        param = param or named[1]
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


def unknown_line(name: str | None) -> str:
    return f"model '{name}' is not served here; GET /v1/models lists the served model"


def unknown_model(name: str) -> Response:
    return openai_problem(404, unknown_line(name), "model", code="model_not_found")


def error_chunk(error: HildaError) -> str:
    """The event that ends a stream with an error."""
    return sse(error_body(status_of(error), str(error), code=code_of(error)))


def model_id(config: Config) -> str:
    """Return the served model's name: a hub name unchanged, or the last part of a path."""
    return Path(config.model.base).name if Path(config.model.base).exists() else config.model.base


def usage(prompt_lengths: list[int], done: list[Completion]) -> dict[str, Any]:
    """Token counts of an answer. A prompt counts once, however many choices answer it."""
    n_prompt, n_completion = sum(prompt_lengths), sum(len(completion.token_ids) for completion in done)
    first = done[:: len(done) // len(prompt_lengths)]
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": sum(completion.stats.prefix_tokens for completion in first)},
    }


class Form:
    """The JSON of an answer, as /v1/chat/completions (`chat`) or /v1/completions writes it.

    detokenize: the text of tokens. before: for each choice, the text in front of its answer (`echo`). calls: the answers
    may have tool calls.
    """

    def __init__(
        self,
        config: Config,
        detokenize: Callable[[list[int]], str],
        before: list[str],
        *,
        chat: bool,
        calls: bool = False,
    ) -> None:
        self.chat, self.model, self.detokenize, self.before = chat, model_id(config), detokenize, before
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.readers = [AnswerReader(calls=calls) for _ in before]
        self.offsets = [len(text) for text in before]  # of each choice's next token in its text

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def logprobs(self, index: int, tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
        """`logprobs` of a choice or chunk, tool calls included; those of a choice must come in their order."""
        if tokens is None:
            return None
        if self.chat:
            content = [self._entry(t.token, t.logprob) | {"top_logprobs": self._entries(t)} for t in tokens]
            return {"content": content, "refusal": None}
        texts, offsets = [self.detokenize([item.token]) for item in tokens], []
        for text in texts:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [item.logprob for item in tokens],
            # The likeliest of two tokens with the same text comes first, and stays.
            "top_logprobs": [
                {self.detokenize([token]): logp for token, logp in reversed([*item.top, (item.token, item.logprob)])}
                for item in tokens
            ],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.detokenize([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}

    def _entries(self, item: TokenLogprob) -> list[dict[str, Any]]:
        return [self._entry(token, logprob) for token, logprob in item.top]

    def choice(self, index: int, item: Completion) -> dict[str, Any]:
        reader = self.readers[index]
        reader.push(item.text, last=True)
        content = {"message": reader.message} if self.chat else {"text": self.before[index] + item.text}
        logprobs, reason = self.logprobs(index, item.logprobs), reader.finish_reason(item.finish_reason)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def chunk(self, index: int, delta: dict[str, Any], news: Finished | Completion | None = None) -> str:
        """A chunk of a stream; a Completion makes it the choice's last one, with the extension `hildanext`."""
        content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        done = news if isinstance(news, Completion) else None
        logprobs = self.logprobs(index, news.logprobs) if isinstance(news, Finished) else None
        reason = None if done is None else self.readers[index].finish_reason(done.finish_reason)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        more = {} if done is None else self.extension([done])
        return sse(self.head(chunk=True) | {"choices": [choice]} | more)

    def block(self, index: int, event: Finished) -> str:
        """The chunks of a finished block. All its log-probabilities are in the first."""
        deltas = self.readers[index].push(event.text)
        if event.logprobs and not deltas:  # the text is held back until more is known
            deltas = [{"content": ""}]
        return "".join(self.chunk(index, delta, None if i else event) for i, delta in enumerate(deltas))

    def end(self, index: int, done: Completion) -> str:
        """The last chunks of a choice."""
        rest = self.readers[index].push("", last=True)
        return "".join(self.chunk(index, delta) for delta in rest) + self.chunk(index, {}, done)

    def extension(self, done: list[Completion]) -> dict[str, Any]:
        """What OpenAI's format has no place for: engine, mode, settings it ignored, and the stats with the seed."""
        return {
            "hildanext": [
                {"engine": item.engine, "mode": item.mode, "ignored": item.ignored, "stats": asdict(item.stats)}
                for item in done
            ]
        }

    def answer(self, done: list[Completion], prompt_lengths: list[int]) -> dict[str, Any]:
        return self.head(chunk=False) | {
            "choices": [self.choice(index, item) for index, item in enumerate(done)],
            "usage": usage(prompt_lengths, done),
            **self.extension(done),
        }
