"""Connections whose client is slow, silent or one too many: each ends, and the others are answered."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from hildanext.server import connections
from support import serving
from support.stepping import stepping, until
from support.waiting import LAST_RESORT

HEAD = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "hi"}'
LIVE = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=LAST_RESORT)


def answer_of(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def is_served(client: socket.socket) -> bool:
    """Whether a request on a connection is answered."""
    client.sendall(LIVE)
    answer = b""
    while not answer.endswith(b'{"status":"live"}'):
        answer += client.recv(65536)
    return answer.startswith(b"HTTP/1.1 200 ")


@pytest.fixture
def url() -> Iterator[str]:
    with serving.running(serving.dummy()) as (url, _):
        yield url


def test_a_header_that_does_not_end_is_408(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(url) as kept:
        assert is_served(kept)
        monkeypatch.setattr(connections, "HEADER_S", 0.05)
        kept.sendall(HEAD)  # on a connection that was good before
        with connect(url) as new, connect(url) as silent:
            new.sendall(HEAD)
            for client in (kept, new):
                answer = answer_of(client)
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert answer.endswith(b"the request's header did not arrive in time")
            assert answer_of(silent) == b""
    assert httpx2.get(f"{url}/health/live").status_code == 200


def test_a_body_that_does_not_end_is_408(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_S", 0.05)
    monkeypatch.setattr(connections, "BODY_RATE", 1e-6)  # each byte is worth a million seconds
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY)
    with connect(url) as slow, connect(url) as silent, connect(url) as refused:
        slow.sendall(head + BODY[:1])
        refused.sendall(HEAD + b"Content-Length: 99999999\r\n\r\n")  # 413, and the server waits for no body
        silent.sendall(head)
        answer = answer_of(silent)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert answer.endswith(b"the request's body did not arrive in time")
        assert answer_of(refused).startswith(b"HTTP/1.1 413 ")
        slow.sendall(BODY[1:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_an_idle_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LAST_RESORT", 0.05)  # the idle time of the servers of tests
    with serving.running(serving.dummy()) as (url, _), connect(url) as client:
        client.sendall(LIVE)
        assert answer_of(client).startswith(b"HTTP/1.1 200 ")


def test_a_new_connection_replaces_the_one_that_has_waited_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "most_connections", lambda: 3)
    with stepping(held=True) as (url, worker, engine), ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        running = pool.submit(httpx2.post, f"{url}/generate", json={"prompt": "hi", "max_new_tokens": 1})
        until(worker, lambda: worker.accepted)
        first, second, third = (stack.enter_context(connect(url)) for _ in range(3))
        assert answer_of(first) == b""  # the request that runs is older, but it does not wait for its client
        for client in (second, third):
            assert is_served(client)
        engine.go.release(10)
        assert running.result().status_code == 200


def test_as_many_connections_as_descriptors_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((64, 16), (256, 128), (1024, 896), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connections.most_connections() == most


def with_few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    connections.HEADER_S = LAST_RESORT


def test_three_hundred_silent_connections_at_256_descriptors(tmp_path: Path) -> None:
    with serving.process(serving.dummy(), tmp_path, fault=with_few_descriptors) as (url, server):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(url)) for _ in range(300)]
            for _ in range(3):
                assert httpx2.get(f"{url}/health/live").status_code == 200
            assert answer_of(clients[0]) == b""
            assert is_served(clients[-1])
        assert "out of system resource" not in server.stderr.read_text()
