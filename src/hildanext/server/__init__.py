"""`serve`: an engine over HTTP. GET /health, POST /generate, one request at a time.

Loopback by default; any other address needs a file of API keys, checked before a body is read.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from hildanext import __version__, engines
from hildanext.config import Config, DecodeConfig, Mode, ServerConfig
from hildanext.engines import Engine
from hildanext.errors import ConfigError, HildaError, UsageError
from hildanext.progress import say
from hildanext.signals import stop_on_signals

BODY_BYTES_PER_CHAR = 12  # JSON may write a character as two escapes of six bytes
BODY_BYTES_BESIDE = 65_536  # keys, numbers, and the messages' own brackets

Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _whole(text: str) -> str:
    # JSON can spell half of a surrogate pair; no tokenizer can take it.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is no text")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Text


class GenerateBody(Body):
    """A request. A setting left out is the server's own; with `mode` given, thresholds left out are that mode's."""

    prompt: Text | None = Field(None, description="Text to continue as it stands.")
    messages: list[Message] | None = Field(None, description="A conversation, through the model's chat template.")
    mode: Mode | None = None
    tau_mask: Share | None = None
    tau_edit: Share | None = Field(None, description="null turns editing off; left out, the preset's.")
    max_new_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, gt=0.0)
    stop: list[Annotated[Text, Field(min_length=1)]] | None = Field(None, max_length=16)
    seed: int | None = Field(None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of 'prompt' and 'messages'")
        return self

    @property
    def text(self) -> str | list[dict[str, str]]:
        """The prompt as `Engine.encode` takes it."""
        return self.prompt if self.prompt is not None else [message.model_dump() for message in self.messages or []]

    @property
    def n_chars(self) -> int:
        """Characters of the prompt or of all messages."""
        return len(self.prompt or "") + sum(len(message.content) for message in self.messages or [])

    def decode_config(self, base: DecodeConfig) -> DecodeConfig:
        """The server's decoding section with this request's settings over it."""
        given: dict[str, Any] = {
            name: value
            for name, value in self
            if name in DecodeConfig.model_fields
            and name in self.model_fields_set
            and (value is not None or name == "tau_edit")
        }
        presets = {"tau_mask": "preset", "tau_edit": "preset"} if "mode" in given else {}
        return base.model_copy(update=presets | given)


def read_keys(server: ServerConfig) -> list[bytes]:
    """API keys of `server.api_key_file`; none without one.

    Raises ConfigError for an address beyond loopback without keys, and for a file that cannot be read or holds none.
    """
    if server.api_key_file is None:
        if not is_loopback(server.host):
            raise ConfigError(
                f"'server.host': {server.host} can be reached from other machines; set server.api_key_file, or use 127.0.0.1"
            )
        return []
    try:
        lines = Path(server.api_key_file).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"'server.api_key_file': cannot read {server.api_key_file}: {error.strerror}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"'server.api_key_file': {server.api_key_file} holds no key; write one a line")
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own. A name other than localhost counts as reachable from outside."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_authorized(header: str, keys: list[bytes]) -> bool:
    """Whether an Authorization header carries one of the keys. Every key is compared, each in constant time."""
    scheme, _, given = header.partition(" ")
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def _error(status: int, line: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": line}, status, headers)


def _validation_line(error: RequestValidationError) -> str:
    """First problem of a body as one line. The input is not echoed: it may be long, and NaN has no JSON."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return f"'{key}': {first['msg'].removeprefix('Value error, ')}"


def make_app(config: Config, engine: Engine) -> FastAPI:
    """The application around an open engine. Raises ConfigError as `read_keys` does."""
    keys = read_keys(config.server)
    limit = config.server.max_prompt_chars
    lock = threading.Lock()
    app = FastAPI(title="HildaNext", version=__version__)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        # Before the body is read: a stranger must not make the server hold or parse one.
        if keys and not is_authorized(request.headers.get("authorization", ""), keys):
            return _error(401, "this server needs 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"})
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal():
                return _error(411, "the request has no Content-Length")
            if int(length) > limit * BODY_BYTES_PER_CHAR + BODY_BYTES_BESIDE:
                return _error(
                    413, f"the body has {length} bytes; prompts may have {limit} characters (server.max_prompt_chars)"
                )
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(422, _validation_line(error))

    @app.exception_handler(HildaError)
    async def refused(request: Request, error: HildaError) -> JSONResponse:
        return _error(400 if isinstance(error, UsageError) else 500, str(error))

    # async: an answer that takes no thread comes while /generate's callers hold all of them, waiting for the lock.
    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "engine": engine.name,
            "engine_reasons": engine.reasons,
            "model": config.model.base,
            "block_size": engine.settings(config).block_size,
            "device": engine.device,
            "version": __version__,
        }

    @app.post("/generate")
    def generate(body: GenerateBody) -> dict[str, Any]:
        if body.n_chars > limit:
            raise UsageError(f"the prompt has {body.n_chars} characters; server.max_prompt_chars is {limit}")
        wanted = config.model_copy(update={"decode": body.decode_config(config.decode)})
        with lock:
            request = engines.Request(engine.encode(body.text), engine.settings(wanted))
            return engine.generate(request).as_dict()

    return app


def bind(server: ServerConfig) -> socket.socket:
    """A socket bound to the address, not listening yet. Raises ConfigError where it cannot be had."""
    sock = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET)
    if sys.platform != "win32":  # there it would take a port that is in use
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((server.host, server.port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"'server.port': cannot listen on {server.host}:{server.port}: {error.strerror}; choose another host or port"
        ) from None
    return sock


def serve(config: Config) -> dict[str, Any]:
    """Answer until SIGINT or SIGTERM; requests under way are finished. Keys and port are checked before anything loads."""
    read_keys(config.server)
    with bind(config.server) as sock:
        engine = engines.open_engine(config)
        try:
            for name, reason in engine.reasons.items():
                say(f"engine {name} passed over: {reason}")
            app = make_app(config, engine)
            host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
            url = f"http://{host}:{config.server.port}"
            say(f"{engine.name} engine, {config.model.base}: {url}/health, {url}/generate; stop with Ctrl-C")
            # uvicorn gives a signal back when it has stopped, which would end the process with that signal's code.
            with stop_on_signals() as signalled:
                # Access lines would go to stdout, which carries the result only.
                uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([sock])
        finally:
            engine.close()
    return {"url": url, "engine": engine.name, "stopped_by": signalled()}
