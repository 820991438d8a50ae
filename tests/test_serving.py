"""The server under load and faults. The engine stands still until the test lets it step: nothing waits on the clock."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

import serving
from hildanext import server
from hildanext.config import Config, ServerConfig, parse_config
from hildanext.decode import Finished, Step
from hildanext.engines import Completion, Event, Request, Stats
from hildanext.engines.dummy import DummyEngine
from hildanext.jobs.watcher import Jobs
from hildanext.server import guard, open_jobs
from hildanext.server.worker import Worker


class Stepping(DummyEngine):
    """Two slots; a request takes as many passes as its budget has tokens. With `held`, a pass waits for `go`."""

    slots = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config, {})
        self.go = threading.Semaphore(0)
        self.held = False
        self.waiting: list[list[Any]] = []
        self.submitted = self.cancelled = self.passes = 0

    def submit(self, request: Request) -> object:
        self.submitted += 1
        self.waiting.append([request, 0, key := object()])
        return key

    def cancel(self, handle: object) -> None:
        self.cancelled += 1
        self.waiting = [one for one in self.waiting if one[2] is not handle]

    @property
    def n_running(self) -> int:
        return min(self.slots, len(self.waiting))

    def step(self) -> list[tuple[object, Event]]:
        if self.held:
            self.go.acquire()
        self.passes += 1
        events: list[tuple[object, Event]] = []
        for one in self.waiting[: self.slots]:
            request, n, handle = one
            events.append((handle, Step(n, 0, [65], [0], [], [1.0], 1.0, n)))
            events.append((handle, Finished(n, [65], "A")))
            one[1] += 1
            if one[1] == request.settings.max_new_tokens:
                events.append((handle, self._done(request)))
        self.waiting = [one for one in self.waiting if one[1] < one[0].settings.max_new_tokens]
        return events

    def _done(self, request: Request) -> Completion:
        n = request.settings.max_new_tokens
        text = bytes(request.prompt_ids).decode() + "A" * n
        return Completion(
            text, [65] * n, "length", "dummy", {}, "Q_MODE", 0.7, 0.5, Stats(n, 0, 1.0, [1.0] * n, n, 0, 1.0, n)
        )


@contextlib.contextmanager
def stepping(*, held: bool = False, with_jobs: bool = False, **settings: Any) -> Iterator[tuple[str, Worker, Stepping]]:
    config = parse_config({"engine": {"order": ["dummy"]}, "server": settings})
    engine = Stepping(config)
    jobs = open_jobs(config) if with_jobs else None
    with serving.running(config, lambda config: engine, jobs=jobs) as (url, worker):
        engine.held = held
        try:
            yield url, worker, engine
        finally:
            engine.held = False
            engine.go.release(10_000)


def until(worker: Worker, condition: Any) -> None:
    """Wait for what another thread is about to do."""
    for _ in range(60_000):
        if condition():
            return
        assert worker.state in ("ready", "failing")
        time.sleep(0.001)
    pytest.fail("it did not happen within a minute")


def post(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/generate", json={"prompt": "x", "max_new_tokens": 3} | body, timeout=60)


def test_beyond_slots_and_queue_there_is_429_and_every_accepted_request_is_answered_once() -> None:
    with stepping(held=True, queue=3) as (url, worker, engine), ThreadPoolExecutor(20) as pool:
        first = [pool.submit(post, url, prompt=f"{i} ") for i in range(5)]
        until(worker, lambda: len(worker.accepted) == 5)
        health = httpx2.get(f"{url}/health").json()
        assert (health["running"], health["queue"], health["slots"]) == (2, 3, 2)
        refused = [pool.submit(post, url).result() for _ in range(7)]
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        engine.go.release(100)
        answers = [future.result() for future in first]
        assert sorted(answer.json()["text"] for answer in answers) == [f"{i} AAA" for i in range(5)]
        assert (engine.submitted, engine.waiting, worker.accepted) == (5, [], set())
        assert post(url).status_code == 200


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits() -> None:
    with stepping(held=True) as (url, worker, engine), ThreadPoolExecutor(4) as pool:
        late = [pool.submit(post, url, deadline_s=1e-6) for _ in range(3)]
        until(worker, lambda: len(worker.accepted) == 3)
        in_time = pool.submit(post, url)
        until(worker, lambda: len(worker.accepted) == 4)
        engine.go.release(100)
        assert [future.result().status_code for future in late] == [504] * 3
        assert in_time.result().json()["text"] == "xAAA"
        stream = post(url, stream=True, max_new_tokens=100, deadline_s=1e-6)
        # The first pass ran before anybody looked at the clock: the stream had begun.
        assert stream.status_code == 200
        assert 'event: error\ndata: {"detail": "the deadline passed' in stream.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot_within_a_pass(stream: bool) -> None:
    with stepping(held=True) as (url, worker, engine):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "x", "max_new_tokens": 1000, "stream": stream}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(worker, lambda: engine.waiting)
            engine.go.release()
            if stream:
                assert client.recv(12) == b"HTTP/1.1 200"
        until(worker, lambda: not worker.accepted)  # the server has seen it go
        passes = engine.passes
        engine.go.release()
        until(worker, lambda: not engine.waiting)
        assert engine.cancelled == 1
        assert engine.passes <= passes + 1


def test_a_client_that_reads_a_byte_at_a_time_holds_no_slot() -> None:
    with stepping() as (url, worker, engine):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "x", "max_new_tokens": 2000, "stream": True}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            for _ in range(20):
                client.recv(1)
            until(worker, lambda: engine.passes > 10 and not engine.waiting)  # decoded, though hardly anything was read
            assert post(url).status_code == 200
            client.recv(1)


def test_a_client_that_takes_nothing_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "STALL_S", 0.05)
    with stepping() as (url, worker, _):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "x", "max_new_tokens": 50_000, "stream": True}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nX-Request-Id: idle\r\n"
        head += "Content-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            log = ""
            while '"event": "request", "id": "idle"' not in log:
                log += capsys.readouterr().err
                time.sleep(0.001)
            until(worker, lambda: not worker.accepted)
            assert log.count('"event": "stalled", "id": "idle"') == 1
            assert "Traceback" not in log
            with contextlib.suppress(ConnectionResetError):
                while client.recv(65536):  # what had been sent, then the end: the connection is closed
                    pass
        assert post(url).status_code == 200


def test_a_storm_of_clients_that_give_up() -> None:
    with stepping() as (url, worker, engine):

        async def one(client: httpx2.AsyncClient, rng: random.Random) -> None:
            body = {"prompt": "x", "max_new_tokens": 5000, "stream": rng.random() < 0.5}
            with contextlib.suppress(httpx2.TimeoutException):
                await client.post(f"{url}/generate", json=body, timeout=rng.uniform(0.01, 0.2))

        async def storm() -> None:
            async with httpx2.AsyncClient() as client:
                await asyncio.gather(*[one(client, random.Random(seed)) for seed in range(100)])

        asyncio.run(storm())
        until(worker, lambda: not worker.accepted and not engine.waiting)
        assert post(url).json()["text"] == "xAAA"


GOOD: dict[str, Any] = {"prompt": "x", "max_new_tokens": 2, "tau_mask": 0.5, "stop": ["a"], "stream": False, "seed": 1}
GOOD_JOB = {"kind": "tokenize", "config": {"data": {"seq_len": 64}, "model": {"base": "x"}}, "options": {}}


def mangled(rng: random.Random, good: dict[str, Any]) -> bytes:
    """A body that is nearly right."""
    good = json.loads(json.dumps(good))
    kind = rng.randrange(4)
    if kind == 0:
        text = bytearray(json.dumps(good).encode())
        for _ in range(rng.randint(1, 6)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        return bytes(text)
    if kind == 1:
        return rng.randbytes(rng.randrange(200))
    if kind == 2:
        text = json.dumps(good)
        return text[: rng.randrange(len(text))].encode()
    junk = [None, -1, 1e400, 10**400, "", [], {}, [[[[]]]], "\ud800", True, float("nan"), "[" * 5000]
    section = rng.choice([good, *(value for value in good.values() if isinstance(value, dict) and value)])
    section[rng.choice([*section, "a\0", "\ud800"])] = rng.choice(junk)
    return (json.dumps(good) if rng.random() < 0.9 else "[" * 100_000).encode("utf-8", "surrogatepass")


def test_a_thousand_malformed_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Jobs, "tick", lambda self: None)  # what is taken all the same waits
    rng, seen = random.Random(0), set()
    with stepping(with_jobs=True) as (url, worker, _), httpx2.Client() as client:
        for number in range(1000):
            path = rng.choice(["/generate", "/v1/completions", "/v1/chat/completions", "/jobs"])
            headers = {"Content-Type": rng.choice(["application/json"] * 8 + ["text/plain", "application/xml"])}
            answer = client.post(
                url + path, content=mangled(rng, GOOD_JOB if path == "/jobs" else GOOD), headers=headers, timeout=60
            )
            assert answer.status_code in (200, 201, 400, 404, 422), (number, answer.text)
            answer.json()
            seen.add(answer.status_code)
        assert seen >= {200, 201, 400, 422}
        assert client.get(f"{url}/health").json()["status"] == "ok"
        assert not worker.accepted


def test_a_body_that_says_two_lengths_is_not_read() -> None:
    with stepping() as (url, _, _):
        host, port = url.removeprefix("http://").split(":")
        head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        head += "Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as client:
            client.sendall(head.encode())  # and no body: the answer does not wait for one
            assert b" 411 " in client.recv(1000).split(b"\r\n")[0]
        assert post(url).status_code == 200


def test_stopping_finishes_what_runs() -> None:
    with ThreadPoolExecutor(2) as pool:
        with stepping(held=True) as (url, worker, _):
            running = [pool.submit(post, url, max_new_tokens=50) for _ in range(2)]
            until(worker, lambda: len(worker.accepted) == 2)
        assert [future.result().json()["text"] for future in running] == ["x" + "A" * 50] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has no such limit")
def test_a_connection_whose_client_takes_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STALL_S", 0.1)
    with server.bind(ServerConfig(port=serving.free_port())) as listening:
        listening.listen()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(listening.getsockname())
            with listening.accept()[0] as accepted, pytest.raises(OSError, match="timed out") as ended:
                accepted.sendall(bytes(50_000_000))
            assert ended.value.errno == errno.ETIMEDOUT
