"""The AR base beside the served model: its answers, its stream, and when there is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from hildanext.config import Config, parse_config
from hildanext.decoding import engines
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.ar import ArEngine
from hildanext.decoding.events import Finished, Step
from hildanext.errors import NonFiniteLogitsError
from hildanext.model.ar_generate import ar_complete
from hildanext.server.app import make_app
from support import serving

DUMMY: dict[str, Any] = {"engine": {"order": ["dummy"]}}


# --- The AR base


@pytest.fixture(scope="module")
def client(converted: Config) -> Iterator[TestClient]:
    with serving.client(converted) as found:
        yield found


@pytest.fixture(scope="module")
def truth(converted: Config) -> Any:
    """`truth(prompt, n)`: transformers' own greedy generate on the base."""
    folder = Path(converted.model.base).parent / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return lambda prompt, n: ar_complete(model, tokenizer, tokenizer(prompt)["input_ids"], n)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    pairs = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


@pytest.mark.parametrize("prompt", ["Once upon a time", "Mia has a kite. It", "x"])
def test_the_base_writes_what_generate_writes(client: TestClient, truth: Any, prompt: str) -> None:
    answer = client.post("/generate/base", json={"prompt": prompt, "max_new_tokens": 20}).json()
    wanted = truth(prompt, 20)
    assert (answer["text"], answer["token_ids"]) == (wanted.text, wanted.token_ids)
    assert (answer["engine"], answer["mode"], answer["stats"]["forwards"]) == ("ar", "AR", len(wanted.token_ids))


def test_the_base_streams_token_by_token(client: TestClient) -> None:
    body = {"prompt": "Once upon a time", "max_new_tokens": 15}
    answer = client.post("/generate/base", json=body).json()
    streamed = client.post("/generate/base", json=body | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert [name for name, _ in events] == ["start", *["token"] * len(answer["token_ids"]), "done"]
    tokens = [data for name, data in events if name == "token"]
    assert [one["token"] for one in tokens] == answer["token_ids"]
    assert "".join(one["text"] for one in tokens) == answer["text"] == events[-1][1]["text"]
    assert events[0][1]["settings"]["block_size"] == 1


def test_its_confidence_is_the_probability_of_the_token(converted: Config) -> None:
    engine = ArEngine(converted, {})
    ids = engine.encode("Once upon a time")
    steps = [event for event in engine.stream(Request(ids, engine.settings(converted))) if isinstance(event, Step)]
    text = ids + [step.tokens[0] for step in steps]
    with torch.no_grad():  # one forward over all of it, no cache
        p = engine.model(torch.tensor([text])).logits[0].float().softmax(-1)
    for step in steps:
        assert step.confidence[0] == pytest.approx(p[step.start - 1, step.tokens[0]].item(), rel=1e-4)
        assert step.tokens[0] == int(p[step.start - 1].argmax())


def test_its_stop_strings_and_end_of_text(converted: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ArEngine(converted, {})
    said = engine.encode("Mia has a red kite.")
    script = iter([*said, engine.tokenizer.eos_token_id])
    monkeypatch.setattr(engine, "_next", lambda ids, cache: (next(script), 0.5))
    settings = engine.settings(converted)._replace(max_new_tokens=50)
    events = list(engine.stream(Request(said, settings)))
    done = events[-1]
    assert isinstance(done, Completion)
    assert (done.text, done.finish_reason, done.token_ids[-1]) == (
        "Mia has a red kite.",
        "stop",
        engine.tokenizer.eos_token_id,
    )
    script = iter(said)
    events = list(engine.stream(Request(said, settings._replace(stop=(" red",)))))
    assert isinstance(events[-1], Completion)
    assert (events[-1].text, events[-1].finish_reason) == ("Mia has a", "stop")
    assert "".join(event.text for event in events if isinstance(event, Finished)) == "Mia has a"


def test_any_of_its_ends_of_text_ends_the_answer(converted: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ArEngine(converted, {})
    said = engine.encode("Mia has a red kite.")
    engine.eos_token_ids = (*engine.eos_token_ids, said[2])
    script = iter(said)
    monkeypatch.setattr(engine, "_next", lambda ids, cache: (next(script), 0.5))
    done = engine.generate(Request(said, engine.settings(converted)._replace(max_new_tokens=50)))
    assert (done.token_ids, done.finish_reason, done.stats.seed) == (said[:3], "stop", None)


def test_its_nan_logits_are_an_error(converted: Config) -> None:
    engine = ArEngine(converted, {})
    engine.model.base_model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteLogitsError, match=r"AR base '.*base': logits are NaN"):
        engine.generate(Request([5], engine.settings(converted)))


def test_a_chat_goes_through_the_template(client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.post("/generate/base", json={"messages": messages, "stream": True})
    plain = client.post("/generate/base", json={"prompt": "<|user|>Hi<|assistant|>", "stream": True})
    assert events_of(chat.text)[1:-1] == events_of(plain.text)[1:-1]


def test_the_base_is_loaded_when_it_is_first_asked_for(converted: Config) -> None:
    opened: list[Config] = []

    def open_base(config: Config, threads: int) -> engines.Engine:
        opened.append(config)
        return engines.open_base(config, threads)

    app = make_app(converted, engines.open_engine, [], open_base=open_base)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        client.portal.call(app.state.worker.is_open.wait)
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200
        assert (client.get("/health").json()["base"], opened) == ("not loaded", [])
        for _ in range(2):
            assert client.post("/generate/base", json={"prompt": "x"}).status_code == 200
        assert (client.get("/health").json()["base"], len(opened)) == ("ready", 1)
        # What /metrics measures is the served model.
        assert "hildanext_tokens_total 8.0" in client.get("/metrics").text


def test_while_it_loads_a_request_waits_no_longer_than_its_deadline(converted: Config) -> None:
    go = threading.Event()

    def slow(config: Config, threads: int) -> engines.Engine:
        go.wait()
        return engines.open_base(config, threads)

    app = make_app(converted, engines.open_engine, [], open_base=slow)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        client.portal.call(app.state.worker.is_open.wait)
        late = client.post("/generate/base", json={"prompt": "x", "deadline_s": 1e-3})
        assert (late.status_code, late.json()["detail"]) == (
            504,
            "the deadline passed while the AR base was loading; try again",
        )
        assert client.get("/health").json()["base"] == "loading"
        go.set()
        assert client.post("/generate/base", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize(
    ("server", "line"),
    [
        ({"base": False}, "server.base is false; set it to true and restart the server"),
        ({}, "the AR base is not available: '{}' is not a converted checkpoint"),
    ],
)
def test_no_base_is_404_and_says_why(converted: Config, server: dict[str, Any], line: str) -> None:
    base = str(Path(converted.model.base).parent / "base")
    with serving.client(parse_config(DUMMY | {"model": {"base": base}, "server": server})) as client:
        for state in ("off" if server else "not loaded", "off" if server else "failed"):
            assert client.get("/health").json()["base"] == state
            answer = client.post("/generate/base", json={"prompt": "x"})
            assert (answer.status_code, answer.json()) == (404, {"detail": line.format(base)})


def test_what_the_base_refuses(client: TestClient, subtests: pytest.Subtests) -> None:
    for body, status, line in [
        ({"prompt": "x", "max_new_tokens": 1000}, 400, "exceed the model's context of 64"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({}, 422, "give exactly one of 'prompt' and 'messages'"),
        ({"prompt": "x", "mode": "Q_MODE"}, 422, "'mode': Extra inputs are not permitted"),
        ({"prompt": "x", "temperature": 1.0}, 422, "'temperature': Extra inputs"),
    ]:
        with subtests.test(body=body, status=status, line=line):
            for stream in (False, True):
                answer = client.post("/generate/base", json=body | {"stream": stream})
                assert answer.status_code == status
                assert line in answer.json()["detail"]


def test_the_base_has_the_threads_that_torch_had(converted: Config) -> None:
    seen = []

    def work() -> None:
        ArEngine(converted, {}, threads=2)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (seen, torch.get_num_threads()) == ([2], 1)


def test_a_client_that_leaves_frees_the_base(converted: Config) -> None:
    with serving.running(converted) as (url, _):
        body = {"prompt": "x", "max_new_tokens": 60, "stream": True}
        for _ in range(3):
            with httpx2.stream("POST", f"{url}/generate/base", json=body) as answer:
                assert "event: start" in next(answer.iter_text())
        assert httpx2.post(f"{url}/generate/base", json={"prompt": "x"}).status_code == 200


# --- The jobs' form
