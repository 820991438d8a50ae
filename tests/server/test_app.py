from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import PreTrainedTokenizerFast

from hildanext import __version__
from hildanext.config import Config, parse_config
from hildanext.decoding.engines import Engine, Event, Request, open_engine
from hildanext.decoding.engines.dummy import NOTICE, DummyEngine
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.errors import ModelError
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.policy import choose_policy
from hildanext.server import meters, openai
from hildanext.server.app import make_app
from support import serving
from support.decoding import diffusion_lm
from support.serving import dummy
from support.waiting import until


@pytest.fixture
def client() -> Iterator[TestClient]:
    with serving.client(dummy(), DummyEngine(dummy(), {"dinfer": "not here"})) as found:
        yield found


def test_health_of_the_dummy_says_so(client: TestClient) -> None:
    health = client.get("/health").json()
    assert health.pop("uptime_s") >= 0
    assert health == {
        "status": "ok",
        "engine": "dummy",
        "engine_reasons": {"dinfer": "not here"},
        "model": "smollm2-135m",
        "modes": ["Q_MODE", "S_MODE"],
        "mode": "Q_MODE",
        "block_size": 32,
        "device": None,
        "dtype": None,
        "policy": None,
        "slots": 1,
        "running": 0,
        "queue": 0,
        "queue_limit": 64,
        "jobs": None,
        "base": "not loaded",
        "version": __version__,
    }
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_the_dummy_in_place_of_a_model_is_never_ready() -> None:
    config = parse_config({"model": {"base": "hilda-smollm2-135m"}})
    with serving.client(config, DummyEngine(config, {"transformers": "no weights"})) as client:
        ready = client.get("/health/ready")
        assert (ready.status_code, "no model is loaded" in ready.json()["detail"]) == (503, True)
        assert client.get("/health").json()["status"] == "no model"
        answer = client.post("/generate", json={"prompt": "hello", "max_new_tokens": 1, "stream": True}).text
        assert NOTICE in events_of(answer)[1][1]["text"]  # however short the answer
    with serving.client(dummy()) as client:
        assert client.get("/health/ready").status_code == 200


def test_the_dummy_answers_and_says_so(client: TestClient) -> None:
    answer = client.post("/generate", json={"prompt": "hello"}).json()
    assert answer["text"] == NOTICE + "hello"
    assert answer["engine"] == "dummy"
    assert answer["engine_reasons"] == {"dinfer": "not here"}
    assert answer["ignored"] == ["every setting: no model ran"]
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert client.post("/generate", json={"messages": messages}).json()["text"] == NOTICE + "two"


def test_thresholds() -> None:
    for asked, seen in [
        ({}, ("Q_MODE", 0.9, 0.2)),
        ({"mode": "S_MODE"}, ("S_MODE", 0.5, 0.0)),
        ({"mode": "Q_MODE", "tau_mask": 0.6}, ("Q_MODE", 0.6, 0.5)),
        ({"tau_edit": None}, ("Q_MODE", 0.9, None)),
        ({"mode": "S_MODE", "tau_edit": None}, ("S_MODE", 0.5, None)),
        ({"tau_edit": 0}, ("Q_MODE", 0.9, 0.0)),
        ({"mode": None, "tau_mask": None, "seed": None}, ("Q_MODE", 0.9, 0.2)),
    ]:
        config = dummy({"tau_mask": 0.9, "tau_edit": 0.2})
        with serving.client(config) as client:
            answer = client.post("/generate", json={"prompt": "x", **asked}).json()
        assert (answer["mode"], answer["tau_mask"], answer["tau_edit"]) == seen, (asked, seen)


def test_every_setting_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    real = DummyEngine.stream
    monkeypatch.setattr(DummyEngine, "stream", lambda self, request: seen.append(request) or real(self, request))
    config = dummy({"max_post_steps": 5, "block_size": 16})
    body = {"prompt": "x", "mode": "S_MODE", "tau_mask": 0.25, "tau_edit": 0.75}
    body |= {"max_new_tokens": 9, "temperature": 0.5, "seed": 7}
    body |= {"top_k": 3, "top_p": 0.5, "repetition_penalty": 1.25, "stop": ["end"], "min_p": 0.125}
    body |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": 2}, "logprobs": 4}
    with serving.client(config) as client:
        client.post("/generate", json=body)
    before = ("S_MODE", 0.25, 0.75, 16, 16, 9, 0.5, 7, 3, 0.5, 1.25, 0, ("end",), None, 8, None)
    assert seen[-1].settings == (*before, 0.5, -0.5, 0.125, ((7, 2.0),), 4, None)


def test_bad_bodies_get_422_and_one_line(client: TestClient, subtests: pytest.Subtests) -> None:
    for body, line in [
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
        ('{"prompt": "x", "min_indel_confidence": 1.5}', "'min_indel_confidence': "),
        ('{"prompt": "x", "min_indel_confidence": "preset"}', "'min_indel_confidence': "),
        ('{"prompt": "x", "temperature": Infinity}', "'temperature': "),
        ('{"prompt": "x", "temperature": 1e39}', "'temperature': "),
        ('{"prompt": "x", "temperature": 2.1}', "'temperature': "),
        ('{"prompt": "x", "top_p": 0}', "'top_p': "),
        ('{"prompt": "x", "repetition_penalty": 1e-40}', "'repetition_penalty': "),
        ('{"prompt": "x", "max_new_tokens": 0}', "'max_new_tokens': "),
        ('{"prompt": "x", "max_new_tokens": 1.5}', "'max_new_tokens': "),
        ('{"prompt": "x", "seed": -1}', "'seed': "),
        ('{"prompt": "x", "mode": "q"}', "'mode': "),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "'messages.0.role': "),
        ('{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "'messages.0.name': Extra"),
    ]:
        with subtests.test(body=body, line=line):
            answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422
            assert line in answer.json()["detail"]
            assert "\n" not in answer.json()["detail"]


def test_what_nobody_foresaw_is_500_with_an_id_and_a_log(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr(meters, "generate_latest", fail)
    monkeypatch.setattr(openai, "model_id", fail)
    for path, where in (
        ("/metrics", lambda body: body["detail"]),
        ("/v1/models", lambda body: body["error"]["message"]),
    ):
        answer = client.get(path, headers={"X-Request-Id": "mine"})
        assert answer.status_code == 500
        assert where(answer.json()) == "the server failed: RuntimeError; see its log for request mine"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert [(line["event"], line["id"]) for line in lines] == [("failed", "mine"), ("request", "mine")]
        assert lines[1]["status"] == 500
        assert 'raise RuntimeError("secret")' in lines[0]["traceback"]


def test_an_empty_prompt_is_400(client: TestClient) -> None:
    for body in [{"prompt": ""}, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}]:
        answer = client.post("/generate", json=body)
        assert (answer.status_code, answer.json()) == (
            400,
            {"detail": "the prompt is empty; give at least one token"},
        ), body


def test_long_prompts_are_refused() -> None:
    with serving.client(dummy(max_prompt_chars=10)) as client:
        assert client.post("/generate", json={"prompt": "é" * 10}).status_code == 200
        line = {"detail": "the prompt has 11 characters; the limit is 10 (server.max_prompt_chars)"}
        messages = [{"role": "user", "content": "x" * 6}, {"role": "assistant", "content": "x" * 5}]
        for body in ({"prompt": "x" * 11}, {"messages": messages}):
            answer = client.post("/generate", json=body)
            assert (answer.status_code, answer.json()) == (400, line)
        # Far beyond, the body is not even read; nor is one that does not say how long it is.
        assert client.post("/generate", json={"prompt": "x" * 100_000}).status_code == 413
        assert client.post("/generate", content=iter([b'{"prompt": "x"}'])).status_code == 411


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelError("the model is not well"), "the model is not well"),
        (ZeroDivisionError("secret"), "the engine failed: ZeroDivisionError; see the server's log"),
    ],
)
def test_a_model_that_fails_is_500_with_a_line_and_the_next_request_has_its_chance(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(self: DummyEngine, request: Request) -> Iterator[Event]:
        raise error
        yield

    with serving.client(dummy()) as client:
        with monkeypatch.context() as broken:
            broken.setattr(DummyEngine, "stream", fail)
            answer = client.post("/generate", json={"prompt": "x"})
            assert (answer.status_code, answer.json()) == (500, {"detail": line})
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200
        assert client.get("/health/ready").status_code == 200


def test_an_engine_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    def broken(config: Config) -> Engine:
        raise ModelError("no such model")

    heard: list[Exception] = []
    app = make_app(dummy(), broken, [], on_failure=heard.append)
    with TestClient(app, base_url="http://localhost:1") as client:
        until(lambda: app.state.worker.state != "loading" and heard)
        assert client.get("/health").json()["status"] == "stopped"
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        answer = client.post("/generate", json={"prompt": "x"})
        assert (answer.status_code, answer.json()) == (503, {"detail": "the server is stopped"})
        assert answer.headers["Retry-After"] == "1"
    assert [str(error) for error in heard] == ["no such model"]


def same(answer: dict[str, Any], direct: dict[str, Any]) -> bool:
    for timed in (answer["stats"], direct["stats"]):
        del timed["seconds"], timed["tokens_per_second"]
    return answer == json.loads(json.dumps(direct))


def test_a_converted_checkpoint_is_served(converted: Config) -> None:
    with serving.client(converted) as client:
        health = client.get("/health").json()
        assert (health["engine"], health["block_size"], health["device"]) == ("transformers", 4, "cpu")
        assert (health["dtype"], health["slots"]) == ("float32", 8)
        assert health["policy"] == choose_policy(converted.model.device, converted.model.dtype).as_dict()
        assert list(health["engine_reasons"]) == ["dinfer"]
        answer = client.post("/generate", json={"prompt": "Once upon", "seed": 1, "tau_edit": None}).json()
        chat = client.post("/generate", json={"messages": [{"role": "user", "content": "Hi"}]})
        assert chat.status_code == 200
        for stream in (False, True):
            long = client.post("/generate", json={"prompt": "Once upon", "max_new_tokens": 1000, "stream": stream})
            assert long.status_code == 400
            assert "exceed the model's context of 64" in long.json()["detail"]
    engine = open_engine(converted)
    settings = engine.settings(converted)._replace(tau_edit=None, seed=1)
    assert same(answer, engine.generate(Request(engine.encode("Once upon"), settings)).as_dict())


def test_insertions_and_deletions_by_request(tiny_tokenizer: PreTrainedTokenizerFast, client: TestClient) -> None:
    """The threshold travels to the engine, null turns them off, and a model without the two tokens refuses one."""
    body = {"prompt": "the cat", "tau_mask": 0.1, "tau_edit": 0.2}
    asked: list[dict[str, Any]] = [{}, {"min_indel_confidence": 0.2}, {"min_indel_confidence": None}]
    engine_keys = {"order": ["transformers"], "runtime": "eager", "context": 64}
    config = parse_config({"engine": engine_keys, "decode": {"max_new_tokens": 24}})
    engine = TransformersEngine(config, {}, diffusion_lm(tiny_tokenizer, "in_place", edits=True))
    with serving.client(config, engine) as served:
        assert served.get("/settings").json()["default"]["min_indel_confidence"] == 0.0
        answers = [served.post("/generate", json=body | one).json() for one in asked]
        other = {"model": config.model.base, "max_tokens": 24}
        texts = [served.post("/v1/completions", json=other | body | one).json()["choices"][0]["text"] for one in asked]
    settings = engine.settings(config)._replace(tau_mask=0.1, tau_edit=0.2)
    for threshold, answer in zip((0.0, 0.2, None), answers, strict=True):
        direct = engine.generate(Request(engine.encode("the cat"), settings._replace(min_indel_confidence=threshold)))
        assert same(answer, direct.as_dict())
    moved = [answer["stats"]["insertions"] + answer["stats"]["deletions"] for answer in answers]
    assert moved[0] > moved[1] > moved[2] == 0
    assert texts == [answer["text"] for answer in answers]
    for path, model in (("/generate", {}), ("/v1/completions", {"model": config.model.base})):
        refused = client.post(path, json={"prompt": "x", "tau_edit": None, "min_indel_confidence": 0.5} | model)
        assert refused.status_code == 400
        assert "the model has no DELETE and INSERT tokens" in refused.text
        assert client.post(path, json={"prompt": "x", "min_indel_confidence": None} | model).status_code == 200


def test_without_a_seed_each_answer_draws_one_and_tells_it(converted: Config) -> None:
    body = {"prompt": "Once upon", "temperature": 2.0, "max_new_tokens": 40}
    with serving.client(converted) as client:
        answers = [client.post("/generate", json=body).json() for _ in range(4)]
        seeds = [answer["stats"]["seed"] for answer in answers]
        assert len(set(seeds)) == len({answer["text"] for answer in answers}) == 4
        again = client.post("/generate", json=body | {"seed": seeds[0]}).json()
        assert (again["token_ids"], again["stats"]["seed"]) == (answers[0]["token_ids"], seeds[0])
        events = events_of(client.post("/generate", json=body | {"stream": True}).text)
        assert events[0][1]["settings"]["seed"] == events[-1][1]["stats"]["seed"]
        greedy = client.post("/generate", json={"prompt": "Once upon", "seed": 3}).json()
        assert greedy["stats"]["seed"] is None


def test_nan_logits_are_500_with_a_sentence_and_the_others_are_answered(converted: Config) -> None:
    lm, _ = load_diffusion_lm(converted.model)
    engine = TransformersEngine(converted, {}, lm)
    (poison,) = engine.encode("x")[-1:]
    head = lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # no longer tied to the embedding
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[poison] = torch.nan
    with serving.client(converted, engine) as client:
        for _ in range(2):
            answer = client.post("/generate", json={"prompt": "x"})
            assert answer.status_code == 500
            assert re.fullmatch("decoding, block 0: logits are NaN or infinite; .*'float32'", answer.json()["detail"])
            assert client.post("/generate", json={"prompt": "Once upon"}).status_code == 200


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_shows_what_the_answer_says(converted: Config) -> None:
    body = {"prompt": "Once upon", "mode": "S_MODE", "seed": 3}
    with serving.client(converted) as client:
        answer = client.post("/generate", json=body | {"trace": True}).json()
        streamed = client.post("/generate", json=body | {"stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert [events[0][0], events[-1][0]] == ["start", "done"]
    assert {name for name, _ in events[1:-1]} == {"step", "block"}
    steps = [data for name, data in events if name == "step"]
    assert steps == answer.pop("trace")
    assert same(events[-1][1], answer)
    blocks = [data for name, data in events if name == "block"]
    assert "".join(block["text"] for block in blocks) == answer["text"]
    assert [token for block in blocks for token in block["new_tokens"]] == answer["token_ids"]
    # The steps alone give the text: what is masked has no piece, the last step of a block has no mask.
    assert events[0][1]["settings"]["mode"] == "S_MODE"
    tokens: dict[int, int] = {}
    for step in steps:
        assert len(step["pieces"]) == len(step["tokens"])
        masked = [index for index, piece in enumerate(step["pieces"]) if piece is None]
        assert not set(masked) & {*step["drafted"], *step["edited"]}
        tokens |= {step["start"] + index: token for index, token in enumerate(step["tokens"])}
    n_prompt = events[0][1]["prompt_tokens"]
    assert [tokens[n_prompt + index] for index in range(len(answer["token_ids"]))] == answer["token_ids"]


# --- Keys and addresses


def test_every_answer_has_an_id_and_security_headers(client: TestClient) -> None:
    for answer in (client.get("/health"), client.get("/nothing"), client.post("/generate", content="{")):
        assert len(answer.headers["X-Request-Id"]) == 32
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    assert client.get("/health", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"] != "a b"


@pytest.mark.parametrize("asked", [False, True])
def test_the_log_has_numbers_and_text_only_if_asked(capsys: pytest.CaptureFixture[str], asked: bool) -> None:
    with serving.client(dummy(log_prompts=asked)) as client:
        client.post("/generate", json={"prompt": "hush"}, headers={"X-Request-Id": "r1"})
        client.post("/generate", json={"prompt": "hush", "stream": True}, headers={"X-Request-Id": "r2"})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    for line, request_id in zip(lines, ("r1", "r2"), strict=True):
        assert (line["event"], line["id"], line["path"], line["status"]) == ("request", request_id, "/generate", 200)
        assert line["tokens"] == len(NOTICE + "hush")
        assert ("hush" in json.dumps(line)) is asked


def test_metrics(client: TestClient) -> None:
    client.post("/generate", json={"prompt": "hello"})
    client.post("/generate", json={"prompt": ""})
    client.get("/made/up")
    text = client.get("/metrics").text
    assert 'hildanext_requests_total{path="/generate",status="200"} 1.0' in text
    assert 'hildanext_requests_total{path="/generate",status="400"} 1.0' in text
    assert 'hildanext_requests_total{path="(none)",status="404"} 1.0' in text
    assert "made" not in text
    assert f"hildanext_tokens_total {float(len(NOTICE + 'hello'))}" in text
    assert 'hildanext_errors_total{kind="UsageError"} 1.0' in text
    assert "hildanext_time_to_first_block_seconds_count 1.0" in text
    assert "hildanext_queue 0.0" in text


# --- The command
