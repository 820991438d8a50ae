"""Middleware around every request: API key, body size, security headers, request id and log line."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hildanext.server.answers import MEANINGS
from hildanext.server.keys import is_authorized, is_own_page
from hildanext.server.meters import Meters

STALL_S = 60.0  # a client that reads nothing for this time is disconnected
OPEN_PATHS = {"/", "/health/live", "/health/ready"}  # nothing secret; probes and browsers send no key
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Stalled(Exception):
    """The client reads nothing. Not a TimeoutError: that is an OSError, which would be answered."""


Refusal = Callable[[str, int, str, dict[str, str]], ASGIApp]  # (path, status, line, headers) -> response


def log(event: str, **fields: Any) -> None:
    """Write one JSON object as a line to stderr."""
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event} | fields
    print(json.dumps(record, ensure_ascii=False), file=sys.stderr, flush=True)


class Guard:
    """ASGI middleware. A request without a valid key is refused before its body is read or parsed."""

    def __init__(
        self,
        app: ASGIApp,
        keys: list[bytes],
        most_bytes: int,
        meters: Meters,
        refuse: Refusal,
        origins: Sequence[str] = (),
    ) -> None:
        """origins: of pages that may call a server without keys, beside its own."""
        self.app, self.keys, self.most_bytes, self.origins = app, keys, most_bytes, origins
        self.meters, self.refuse = meters, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, began, status = Headers(scope=scope), time.monotonic(), 0
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                mine = MutableHeaders(scope=message)
                mine["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    mine[name] = value
            try:
                await asyncio.wait_for(send(message), STALL_S)
            except asyncio.TimeoutError:  # not the built-in TimeoutError on Python 3.10
                raise Stalled from None

        try:
            refusal = self._refusal(scope, headers)
            await (self.app if refusal is None else refusal)(scope, receive, send_on)
        except Stalled:
            log("stalled", id=request_id)
        except Exception as error:  # unexpected: the traceback goes to the log, one line to the client
            self.meters.errors.labels(type(error).__name__).inc()
            log("failed", id=request_id, traceback=traceback.format_exc())
            if status:  # the answer has begun: the connection is cut
                raise
            line = f"the server failed: {type(error).__name__}; see its log for request {request_id}"
            await self.refuse(scope["path"], 500, line, {})(scope, receive, send_on)
        finally:
            self._record(scope, status, time.monotonic() - began, request_id)

    def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        path, method = scope["path"], scope["method"]

        def refused(status: int, line: str = "", extra: dict[str, str] | None = None) -> ASGIApp:
            return self.refuse(path, status, line or MEANINGS[status], extra or {})

        if not self.keys and not is_own_page(headers.get("host", ""), headers.get("origin", ""), self.origins):
            return refused(
                403, "without API keys this server accepts requests from this machine only (check Host and Origin)"
            )
        is_open = path in OPEN_PATHS or path.startswith("/web/")
        if self.keys and not is_open and not is_authorized(headers.get("authorization", ""), self.keys):
            return refused(401, "this server needs 'Authorization: Bearer KEY'", {"WWW-Authenticate": "Bearer"})
        if method in ("POST", "PUT", "PATCH"):
            if "transfer-encoding" in headers:  # it would override Content-Length
                return refused(411, "Transfer-Encoding is not accepted; send Content-Length")
            length = headers.get("content-length", "")
            if not (length.isascii() and length.isdecimal() and len(length) < 20):
                return refused(411, "Content-Length is missing or not a number")
            if int(length) > self.most_bytes:
                return refused(
                    413, f"the body has {length} bytes; the limit is {self.most_bytes} (from server.max_prompt_chars)"
                )
        return None

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = scope.get("route")
        path = (
            route.path if route is not None else "(none)"
        )  # not the raw path: clients could create any number of labels
        self.meters.answers.labels(path, status).inc()
        self.meters.seconds.labels(path).observe(seconds)
        facts = scope["state"].get("facts", {})
        if "error" in facts:
            self.meters.errors.labels(facts["error"]).inc()
        log(
            "request",
            id=request_id,
            method=scope["method"],
            path=scope["path"],
            status=status,
            ms=round(seconds * 1e3, 1),
            **facts,
        )
