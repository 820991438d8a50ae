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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hildanext.config import Config, ServerConfig, parse_config
from hildanext.decoding.engines.dummy import DummyEngine
from hildanext.jobs.watcher import Jobs
from hildanext.server import command, guard
from hildanext.server import worker as server_worker
from hildanext.server.app import make_app
from hildanext.server.worker import Worker
from support import serving, waiting
from support.stepping import Stepping, passed, stepping, until


def post(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/generate", json={"prompt": "x", "max_new_tokens": 3} | body)


def test_beyond_slots_and_queue_there_is_429_and_every_accepted_request_is_answered_once() -> None:
    with stepping(queue=3) as (url, worker, engine), ThreadPoolExecutor(20) as pool:
        engine.seconds = 30.0
        assert post(url).status_code == 200
        engine.held = True
        first = [pool.submit(post, url, prompt=f"{i} ") for i in range(5)]
        until(worker, lambda: len(worker.accepted) == 5)
        health = httpx2.get(f"{url}/health").json()
        assert (health["running"], health["queue"], health["slots"]) == (2, 3, 2)
        refused = [pool.submit(post, url).result() for _ in range(7)]
        assert {answer.status_code for answer in refused} == {429}
        # Two slots, four requests to be answered before another one has a slot, 30 seconds each as the last one took.
        assert {answer.headers["Retry-After"] for answer in refused} == {"60"}
        engine.go.release(100)
        answers = [future.result() for future in first]
        assert sorted(answer.json()["text"] for answer in answers) == [f"{i} AAA" for i in range(5)]
        assert (engine.submitted, engine.waiting, worker.accepted) == (6, [], set())
        assert post(url).status_code == 200


def test_before_the_first_answer_a_refused_client_waits_as_long_as_the_oldest_request_has() -> None:
    with stepping(held=True, queue=0) as (url, worker, engine), ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(post, url)
        until(worker, lambda: len(worker.accepted) == 2)
        for ticket in worker.accepted:
            ticket.began -= 1e6
        assert int(post(url).headers["Retry-After"]) >= 5e5  # one of the two slots
        engine.go.release(100)


def late_stream(pool: ThreadPoolExecutor, url: str, worker: Worker, engine: Stepping) -> httpx2.Response:
    """A stream whose deadline passes in its first pass."""
    engine.held = True
    while engine.go.acquire(blocking=False):
        pass
    future = pool.submit(post, url, stream=True, max_new_tokens=100)
    until(worker, lambda: engine.waiting)
    passed(worker)
    engine.go.release(100)
    answer = future.result()
    assert 'event: error\ndata: {"detail": "the deadline passed' in answer.text
    return answer


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits() -> None:
    with stepping(held=True) as (url, worker, engine), ThreadPoolExecutor(4) as pool:
        late = [pool.submit(post, url) for _ in range(3)]
        until(worker, lambda: len(worker.accepted) == 3)
        passed(worker)
        in_time = pool.submit(post, url)
        until(worker, lambda: len(worker.accepted) == 4)
        engine.go.release(100)
        assert [future.result().status_code for future in late] == [504] * 3
        assert in_time.result().json()["text"] == "xAAA"
        assert late_stream(pool, url, worker, engine).status_code == 200  # it had begun


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot_within_a_pass(stream: bool) -> None:
    with stepping(held=True) as (url, worker, engine):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "x", "max_new_tokens": 1000, "stream": stream}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port)), timeout=waiting.LAST_RESORT) as client:
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
        with socket.create_connection((host, int(port)), timeout=waiting.LAST_RESORT) as client:
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
        with socket.create_connection((host, int(port)), timeout=waiting.LAST_RESORT) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            log = ""

            def is_logged() -> bool:
                nonlocal log
                log += capsys.readouterr().err
                return '"event": "request", "id": "idle"' in log

            waiting.until(is_logged)
            until(worker, lambda: not worker.accepted)
            assert log.count('"event": "stalled", "id": "idle"') == 1
            assert "Traceback" not in log
            with contextlib.suppress(ConnectionResetError):
                while client.recv(65536):  # what had been sent, then the end: the connection is closed
                    pass
        assert post(url).status_code == 200


def test_a_storm_of_clients_that_give_up() -> None:
    with stepping(held=True) as (url, worker, engine):

        async def storm() -> None:
            rng = random.Random(0)
            async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None)) as client:
                bodies = [{"prompt": "x", "max_new_tokens": 5000, "stream": rng.random() < 0.5} for _ in range(100)]
                asking = [asyncio.create_task(client.post(f"{url}/generate", json=body)) for body in bodies]
                await asyncio.to_thread(until, worker, lambda: len(worker.accepted) == 66)
                for task in rng.sample(asking, len(asking)):
                    task.cancel()
                    await asyncio.sleep(0)
                await asyncio.gather(*asking, return_exceptions=True)

        asyncio.run(storm())
        until(worker, lambda: not worker.accepted)
        engine.held = False
        engine.go.release()
        until(worker, lambda: not engine.waiting)
        assert engine.cancelled == engine.submitted > 0
        assert post(url).json()["text"] == "xAAA"


GOOD: dict[str, Any] = {"prompt": "x", "max_new_tokens": 2, "tau_mask": 0.5, "stop": ["a"], "stream": False, "seed": 1}
GOOD_JOB = {"kind": "tokenize", "config": {"data": {"seq_len": 64}, "model": {"base": "./x"}}, "options": {}}


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
        with socket.create_connection((host, int(port)), timeout=waiting.LAST_RESORT) as client:
            client.sendall(head.encode())  # and no body: the answer does not wait for one
            assert b" 411 " in client.recv(1000).split(b"\r\n")[0]
        assert post(url).status_code == 200


def is_refused(url: str) -> bool:
    """Whether nobody listens there any more."""
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=waiting.LAST_RESORT).close()
    except ConnectionRefusedError:
        return True
    return False


def test_stopping_finishes_what_runs() -> None:
    with stepping(held=True, drain_s=600) as (url, worker, engine), ThreadPoolExecutor(2) as pool:
        running = [pool.submit(post, url, max_new_tokens=50) for _ in range(2)]
        until(worker, lambda: len(worker.accepted) == 2)
        engine.server.should_exit = True
        until(worker, lambda: is_refused(url))
        assert not any(future.done() for future in running)
        engine.go.release(1000)
        assert [future.result().json()["text"] for future in running] == ["x" + "A" * 50] * 2


def test_what_does_not_finish_in_time_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_worker, "STOP_S", 0.1)
    with ThreadPoolExecutor(1) as pool, stepping(held=True, drain_s=0) as (url, worker, engine):
        running = pool.submit(post, url)
        until(worker, lambda: worker.accepted)
        engine.server.should_exit = True
        with contextlib.suppress(httpx2.TransportError):
            assert running.result().status_code >= 500
        until(worker, lambda: is_refused(url))


def test_a_server_that_stops_does_not_wait_for_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_worker, "STOP_S", 0.1)
    config, go = parse_config({"engine": {"order": ["dummy"]}}), threading.Event()

    def slow(config: Config) -> DummyEngine:
        go.wait()
        return DummyEngine(config, {})

    async def all_of_it() -> None:
        app = make_app(config, slow, [])
        async with app.router.lifespan_context(app):
            assert app.state.worker.state == "loading"

    asyncio.run(all_of_it())
    go.set()


def test_an_engine_without_requests_frees_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_worker, "REST_S", 0.01)
    rests: list[int] = []
    monkeypatch.setattr(Stepping, "rest", lambda engine: rests.append(engine.passes))
    with stepping() as (url, worker, _):
        until(worker, lambda: rests)
        assert post(url).status_code == 200
        until(worker, lambda: rests == [0, 3])
        assert post(url).status_code == 200
        until(worker, lambda: rests == [0, 3, 6])


# --- An engine that fails


def test_an_engine_that_cannot_go_on_tells_everybody() -> None:
    with stepping(held=True) as (url, worker, engine), ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(post, url, stream=stream) for stream in (False, True, False)]
        until(worker, lambda: sum(bool(ticket.request.prompt_ids) for ticket in list(worker.accepted)) == 3)

        def broken(*_: object) -> Any:
            raise RuntimeError("secret")

        engine.cancel = engine._done = broken  # type: ignore[method-assign]
        engine.go.release(100)
        for future in waiting:
            answer = future.result()
            assert answer.status_code == 500 or "event: error" in answer.text
            assert "the engine failed: RuntimeError" in answer.text
        until(worker, lambda: worker.state == "stopped")
        assert httpx2.get(f"{url}/health/ready").status_code == 503
        assert httpx2.get(f"{url}/health").json()["status"] == "stopped"
        refused = post(url)
        assert (refused.status_code, refused.json()) == (503, {"detail": "the server is stopped"})
        assert not worker.accepted


def test_a_request_that_the_engine_cannot_take_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with stepping() as (url, worker, engine):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "submit", lambda request: 1 // 0)
            assert post(url).status_code == 500
        assert post(url).status_code == 200
        assert worker.state == "ready"


# --- Prompts that take long to read


def test_prompts_that_are_being_read_have_a_place_a_deadline_and_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Semaphore(0)
    with stepping(queue=1) as (url, worker, engine), ThreadPoolExecutor(4) as pool:
        encode = engine.encode
        monkeypatch.setattr(engine, "encode", lambda *given: read.acquire() and encode(*given))
        try:
            first = pool.submit(post, url, prompt="first")
            until(worker, lambda: len(worker.accepted) == 1)
            assert post(url, deadline_s=0.01).status_code == 504
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(
                    f"{url}/generate", json={"prompt": "gone"}, timeout=httpx2.Timeout(waiting.LAST_RESORT, read=0.01)
                )
            until(worker, lambda: len(worker.accepted) == 1)
            others = [pool.submit(post, url) for _ in range(2)]
            until(worker, lambda: len(worker.accepted) == 3)
            refused = post(url)
            assert refused.status_code == 429
            assert httpx2.get(f"{url}/health/live").status_code == 200  # the event loop reads no prompt
            assert engine.submitted == 0
        finally:
            read.release(100)
        assert [future.result().status_code for future in (first, *others)] == [200] * 3
        assert engine.submitted == 3


# --- What /metrics says


def test_what_the_metrics_say_of_passes_and_of_errors_in_a_stream() -> None:
    def found(url: str) -> dict[str, float]:
        lines = httpx2.get(f"{url}/metrics").text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name.removeprefix("hildanext_"): float(value) for name, _, value in pairs}

    with stepping() as (url, worker, engine):
        assert post(url, max_new_tokens=3).status_code == 200
        seen = found(url)
        assert (seen["batch_size_count"], seen["batch_size_sum"]) == (
            3,
            3,
        )  # one request in each pass, the last one too
        assert (seen["tokens_per_forward_count"], seen["tokens_per_forward_sum"]) == (1, 1.0)
        assert (seen["tokens_per_second_count"], seen["tokens_per_second_sum"]) == (1, 3.0)
        assert (seen["tokens_total"], seen["forwards_total"], seen["time_to_first_block_seconds_count"]) == (3, 3, 1)
        engine.held = True
        with ThreadPoolExecutor(3) as pool:
            three = [pool.submit(post, url, max_new_tokens=2) for _ in range(3)]
            until(worker, lambda: len(worker.accepted) == 3)
            engine.go.release(100)
            assert [future.result().status_code for future in three] == [200] * 3
            late_stream(pool, url, worker, engine)
        until(worker, lambda: found(url).get('errors_total{kind="DeadlineError"}') == 1)
        more = found(url)
        assert more["batch_size_sum"] - seen["batch_size_sum"] == 7  # 3 requests of 2 passes, however they met, and one


# --- Connections


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has no such limit")
def test_a_connection_whose_client_takes_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "STALL_S", 0.1)
    with command.bind(ServerConfig(port=serving.free_port())) as listening:
        listening.listen()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(listening.getsockname())
            with listening.accept()[0] as accepted, pytest.raises(OSError, match="timed out") as ended:
                accepted.sendall(bytes(50_000_000))
            assert ended.value.errno == errno.ETIMEDOUT
