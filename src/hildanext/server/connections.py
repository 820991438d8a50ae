"""TCP connections of the server: time limits for what a client sends, and room for new connections.

A client must send a request's header within HEADER_S seconds and its body within BODY_S seconds, one more for each
BODY_RATE bytes (as Apache's mod_reqtimeout does). Where the process could run out of file descriptors, a new connection
replaces the one that has waited longest for its client.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from functools import partial
from typing import Any, Literal, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0
BODY_S = 20.0
BODY_RATE = 500  # bytes a second
IDLE_S = 75.0  # between two requests; longer than the clients' own limits, so that the client closes first
MOST_CONNECTIONS = 4096
RESERVED = 128  # file descriptors kept for files, jobs, and connections that were accepted and are not yet counted
ACCEPTED_AT_ONCE = 16  # connections that asyncio accepts before it runs anything else
BACKLOG = 1024  # connections that the system completes before they are accepted

Phase = Literal["idle", "header", "body"]


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection. `waiting` holds all connections that wait for their client, the longest first."""

    def __init__(self, *args: Any, waiting: dict[Connection, None], most: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting, self.most = waiting, most
        self.phase: Phase | None = None  # None: the request is complete, and its answer is not
        self.since, self.n_bytes = 0.0, 0  # start of the phase, and bytes of header or body received in it
        self.clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._enter("header")
        if len(self.connections) > self.most:
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]  # now, for others may connect before it is closed
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.n_bytes += len(data)
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def _follow(self) -> None:
        """Enter the phase that the parser is in."""
        state, phase = self.conn.their_state, cast("Phase | None", None)
        if state is h11.SEND_BODY:
            phase = "body"
        elif state is h11.IDLE:
            phase = "header" if self.conn.trailing_data[0] or self.cycle is None else "idle"
        if phase != self.phase:
            self._enter(phase)
            self.n_bytes = len(self.cycle.body) if phase == "body" else len(self.conn.trailing_data[0])

    def _enter(self, phase: Phase | None) -> None:
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None
        self.waiting.pop(self, None)
        self.phase, self.since, self.n_bytes = phase, self.loop.time(), 0
        if phase is not None and not self.transport.is_closing():
            self.waiting[self] = None
            if phase != "idle":  # uvicorn itself ends idle connections
                self.clock = self.loop.call_at(self._deadline(), self._check)

    def _deadline(self) -> float:
        return self.since + (HEADER_S if self.phase == "header" else BODY_S + self.n_bytes / BODY_RATE)

    def _check(self) -> None:
        """End the connection if its client is late."""
        if self.loop.time() < self._deadline():
            self.clock = self.loop.call_at(self._deadline(), self._check)
            return
        line = f"the request's {self.phase} did not arrive in time".encode()
        if self.cycle is not None and self.phase == "body":
            self.cycle.disconnected = True  # the application gets no more of the body, and its answer goes nowhere
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and (self.phase == "body" or self.n_bytes):
            headers = {"Content-Type": "text/plain", "Content-Length": str(len(line)), "Connection": "close"}
            head = h11.Response(status_code=408, headers=list(headers.items()), reason="Request Timeout")
            for event in (head, h11.Data(data=line), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start. asyncio accepts as many connections at once as may wait in the system; they are given two numbers."""
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(BACKLOG)


def most_connections() -> int:
    """The connections that this process may have open, from its limit of file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MOST_CONNECTIONS, soft - RESERVED))


def make_server(app: Any, drain_s: int, idle_s: float = IDLE_S) -> Server:
    """Return a server of the application, not yet started. After a signal, running requests have `drain_s` seconds."""
    protocol = partial(Connection, waiting={}, most=most_connections())
    settings = uvicorn.Config(
        app,
        http=cast(Any, protocol),
        ws="none",  # a WebSocket would leave Connection
        log_level="warning",
        access_log=False,  # uvicorn writes access lines to stdout, which is reserved for the result
        timeout_graceful_shutdown=drain_s,
        timeout_keep_alive=cast(Any, idle_s),
        backlog=ACCEPTED_AT_ONCE,
    )
    return Server(settings)
