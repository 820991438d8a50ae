from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hildanext import __version__, server
from hildanext.config import Config, parse_config
from hildanext.engines import Completion, Request, open_engine
from hildanext.engines.dummy import NOTICE, DummyEngine
from hildanext.errors import ConfigError, ModelError
from hildanext.model import load_diffusion_lm, save_diffusion_lm
from hildanext.server import is_authorized, is_loopback, make_app, serve
from hildanext.tiny import story_tokenizer, tiny_llama


def dummy(decode: dict[str, Any] | None = None, **keys: Any) -> Config:
    return parse_config({"engine": {"order": ["dummy"]}, "decode": decode or {}, "server": keys})


@pytest.fixture
def client() -> TestClient:
    return TestClient(make_app(dummy(), DummyEngine(dummy(), {"dinfer": "not here"})))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny converted checkpoint, random weights."""
    folder = tmp_path_factory.mktemp("converted")
    tokenizer = story_tokenizer(400)
    tiny_llama(tokenizer, hidden=32, layers=1, context=64, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    raw = {"model": {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"}}
    lm, _ = load_diffusion_lm(parse_config(raw).model)
    lm.block_size = 4
    save_diffusion_lm(lm, folder / "model")
    raw["model"]["base"] = str(folder / "model")
    return parse_config(raw | {"decode": {"max_new_tokens": 8}})


def test_health_of_the_dummy_says_so(client: TestClient) -> None:
    assert client.get("/health").json() == {
        "status": "ok",
        "engine": "dummy",
        "engine_reasons": {"dinfer": "not here"},
        "model": "smollm2-135m",
        "block_size": 32,
        "device": None,
        "version": __version__,
    }


def test_the_dummy_answers_and_says_so(client: TestClient) -> None:
    answer = client.post("/generate", json={"prompt": "hello"}).json()
    assert answer["text"] == NOTICE + "hello"
    assert answer["engine"] == "dummy"
    assert answer["engine_reasons"] == {"dinfer": "not here"}
    assert answer["ignored"] == ["every setting: no model ran"]
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert client.post("/generate", json={"messages": messages}).json()["text"] == NOTICE + "two"


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        ({}, ("Q_MODE", 0.9, 0.2)),
        ({"mode": "S_MODE"}, ("S_MODE", 0.5, 0.0)),
        ({"mode": "Q_MODE", "tau_mask": 0.6}, ("Q_MODE", 0.6, 0.5)),
        ({"tau_edit": None}, ("Q_MODE", 0.9, None)),
        ({"mode": "S_MODE", "tau_edit": None}, ("S_MODE", 0.5, None)),
        ({"tau_edit": 0}, ("Q_MODE", 0.9, 0.0)),
        ({"mode": None, "tau_mask": None, "seed": None}, ("Q_MODE", 0.9, 0.2)),
    ],
)
def test_thresholds(asked: dict[str, Any], seen: tuple[str, float, float | None]) -> None:
    config = dummy({"tau_mask": 0.9, "tau_edit": 0.2})
    answer = TestClient(make_app(config, open_engine(config))).post("/generate", json={"prompt": "x", **asked}).json()
    assert (answer["mode"], answer["tau_mask"], answer["tau_edit"]) == seen


def test_every_setting_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    real = DummyEngine.generate
    monkeypatch.setattr(DummyEngine, "generate", lambda self, request: seen.append(request) or real(self, request))
    config = dummy({"max_post_steps": 5, "block_size": 16})
    body = {"prompt": "x", "mode": "S_MODE", "tau_mask": 0.25, "tau_edit": 0.75}
    body |= {"max_new_tokens": 9, "temperature": 0.5, "seed": 7}
    body |= {"top_k": 3, "top_p": 0.5, "repetition_penalty": 1.25, "stop": ["end"]}
    TestClient(make_app(config, open_engine(config))).post("/generate", json=body)
    assert seen[0].settings == ("S_MODE", 0.25, 0.75, 5, 16, 9, 0.5, 7, 3, 0.5, 1.25, 0, ("end",))


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("{", "JSON decode error"),
        ("[]", "'body': Input should be"),
        ("{}", "'body': give exactly one of 'prompt' and 'messages'"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "'body': give exactly one of"),
        ('{"prompt": "x", "tau": 1}', "'tau': Extra inputs are not permitted"),
        ('{"prompt": 5}', "'prompt': "),
        ('{"prompt": "\\ud800"}', "'prompt': "),
        ('{"prompt": "x", "tau_mask": 1.5}', "'tau_mask': "),
        ('{"prompt": "x", "tau_mask": "0.5"}', "'tau_mask': "),
        ('{"prompt": "x", "tau_edit": NaN}', "'tau_edit': "),
        ('{"prompt": "x", "temperature": Infinity}', "'temperature': "),
        ('{"prompt": "x", "max_new_tokens": 0}', "'max_new_tokens': "),
        ('{"prompt": "x", "max_new_tokens": 1.5}', "'max_new_tokens': "),
        ('{"prompt": "x", "seed": -1}', "'seed': "),
        ('{"prompt": "x", "mode": "q"}', "'mode': "),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "'messages.0.role': "),
        ('{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "'messages.0.name': Extra"),
    ],
)
def test_bad_bodies_get_422_and_one_line(client: TestClient, body: str, line: str) -> None:
    answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert line in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize("body", [{"prompt": ""}, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}])
def test_an_empty_prompt_is_400(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/generate", json=body)
    assert (answer.status_code, answer.json()) == (400, {"detail": "the prompt is empty; give at least one token"})


def test_long_prompts_are_refused() -> None:
    config = dummy(max_prompt_chars=10)
    client = TestClient(make_app(config, open_engine(config)))
    assert client.post("/generate", json={"prompt": "é" * 10}).status_code == 200
    line = {"detail": "the prompt has 11 characters; server.max_prompt_chars is 10"}
    messages = [{"role": "user", "content": "x" * 6}, {"role": "assistant", "content": "x" * 5}]
    for body in ({"prompt": "x" * 11}, {"messages": messages}):
        answer = client.post("/generate", json=body)
        assert (answer.status_code, answer.json()) == (400, line)
    # Far beyond, the body is not even read; nor is one that does not say how long it is.
    assert client.post("/generate", json={"prompt": "x" * 100_000}).status_code == 413
    assert client.post("/generate", content=iter([b'{"prompt": "x"}'])).status_code == 411


def test_a_model_that_fails_is_500_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DummyEngine, request: Request) -> Completion:
        raise ModelError("the model is not well")

    monkeypatch.setattr(DummyEngine, "generate", fail)
    client = TestClient(make_app(dummy(), open_engine(dummy())))
    answer = client.post("/generate", json={"prompt": "x"})
    assert (answer.status_code, answer.json()) == (500, {"detail": "the model is not well"})


def test_one_request_at_a_time_and_health_all_the_while(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, go = 0, 0, threading.Event()
    real = DummyEngine.generate

    def slow(self: DummyEngine, request: Request) -> Completion:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        go.wait(30)
        done = real(self, request)
        inside -= 1
        return done

    monkeypatch.setattr(DummyEngine, "generate", slow)
    answers: list[int] = []
    with TestClient(make_app(dummy(), open_engine(dummy()))) as client:
        # More than the thread pool holds (40): /health must not need one of its threads.
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/generate", json={"prompt": "x"}).status_code))
            for _ in range(45)
        ]
        for thread in threads:
            thread.start()
        while inside == 0:
            time.sleep(0.01)
        assert client.get("/health").status_code == 200
        go.set()
        for thread in threads:
            thread.join()
    assert answers == [200] * 45
    assert most == 1


def test_a_converted_checkpoint_is_served(converted: Config) -> None:
    engine = open_engine(converted)
    client = TestClient(make_app(converted, engine))
    health = client.get("/health").json()
    assert (health["engine"], health["block_size"], health["device"]) == ("transformers", 4, "cpu")
    assert list(health["engine_reasons"]) == ["dinfer"]
    answer = client.post("/generate", json={"prompt": "Once upon", "seed": 1, "tau_edit": None}).json()
    settings = engine.settings(converted)._replace(tau_edit=None, seed=1)
    direct = engine.generate(Request(engine.encode("Once upon"), settings)).as_dict()
    for timed in (answer["stats"], direct["stats"]):
        del timed["seconds"], timed["tokens_per_second"]
    assert answer == json.loads(json.dumps(direct))
    chat = client.post("/generate", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert chat.status_code == 200
    long = client.post("/generate", json={"prompt": "Once upon", "max_new_tokens": 1000})
    assert long.status_code == 400
    assert "exceed the model's context of 64" in long.json()["detail"]


# --- Keys and addresses


@pytest.fixture
def keyed(tmp_path: Path) -> Callable[..., TestClient]:
    (tmp_path / "keys").write_bytes("first\r\n\n  second key \nschlüssel\n".encode())

    def make(**keys: Any) -> TestClient:
        config = dummy(api_key_file=str(tmp_path / "keys"), **keys)
        return TestClient(make_app(config, open_engine(config)))

    return make


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer first", 200),
        (b"bearer second key", 200),
        ("Bearer schlüssel".encode(), 200),
        (None, 401),
        (b"", 401),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"Bearer firs", 401),
        (b"Bearer firstt", 401),
        (b"Basic first", 401),
        (b"first", 401),
    ],
)
def test_keys(keyed: Callable[..., TestClient], header: bytes | None, status: int) -> None:
    client = keyed()
    headers = {} if header is None else {"Authorization": header}
    for answer in (
        client.get("/health", headers=headers),
        client.post("/generate", json={"prompt": "x"}, headers=headers),
    ):
        assert answer.status_code == status
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    # The key comes first: a stranger learns nothing about bodies or paths.
    assert client.post("/generate", content="{", headers=headers).status_code == (401 if status == 401 else 422)
    assert client.get("/openapi.json", headers=headers).status_code == status


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    real = server.hmac.compare_digest
    monkeypatch.setattr(server.hmac, "compare_digest", lambda a, b: seen.append(b) or real(a, b))
    assert is_authorized("Bearer a", [b"a", b"b", b"c"])
    assert seen == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def refused(monkeypatch: pytest.MonkeyPatch, config: Config, match: str) -> None:
    """`serve` refuses before anything loads."""
    monkeypatch.setattr(server.engines, "open_engine", lambda config: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=match):
        serve(config)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_no_other_address_without_keys(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    refused(monkeypatch, dummy(host=host), "'server.host': .* set server.api_key_file")
    with pytest.raises(ConfigError, match=r"'server\.host'"):
        make_app(dummy(host=host), DummyEngine(dummy(), {}))


def test_other_addresses_with_keys(keyed: Callable[..., TestClient]) -> None:
    assert keyed(host="0.0.0.0").get("/health").status_code == 401


def test_key_files_that_hold_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n  \n")
    refused(monkeypatch, dummy(host="0.0.0.0", api_key_file=str(tmp_path / "empty")), "empty holds no key")
    refused(monkeypatch, dummy(api_key_file=str(tmp_path / "none")), "'server.api_key_file': cannot read .*none")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(monkeypatch, dummy(port=taken.getsockname()[1]), "'server.port': cannot listen on 127.0.0.1:")


# --- The command


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM does not exist there")
def test_the_command_answers_and_stops_with_0(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "c.json").write_text(json.dumps({"engine": {"order": ["dummy"]}, "server": {"port": port}}))
    command = [sys.executable, "-m", "hildanext.cli", "serve", "--json", "--config", str(tmp_path / "c.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        while True:
            try:
                health = ask(f"http://127.0.0.1:{port}/health")
                break
            except urllib.error.URLError:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.1)
        assert health["engine"] == "dummy"
        assert ask(f"http://127.0.0.1:{port}/generate", {"prompt": "hi"})["text"] == NOTICE + "hi"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out) == {"url": f"http://127.0.0.1:{port}", "engine": "dummy", "stopped_by": "SIGTERM"}
    assert "Traceback" not in err
