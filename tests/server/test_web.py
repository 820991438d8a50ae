"""What the page is made of, as served; and what the server has for it alone: the AR base, the schema of the jobs' form."""

from __future__ import annotations

import json
import re
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
from hildanext.jobs.kinds import KINDS, SECTIONS, TAKES
from hildanext.model.ar_generate import ar_complete
from hildanext.server.app import make_app
from hildanext.server.command import open_jobs
from support import serving

WEB = Path(__file__).parents[2] / "src" / "hildanext" / "server" / "web"
FILES = sorted(path.name for path in WEB.iterdir())
DUMMY: dict[str, Any] = {"engine": {"order": ["dummy"]}}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def locked() -> Iterator[TestClient]:
    with serving.client(parse_config(DUMMY), keys=[b"secret"]) as found:
        yield found


@pytest.mark.parametrize("name", ["", *FILES])
def test_every_file_of_the_page(locked: TestClient, name: str) -> None:
    path = f"/web/{name}" if name else "/"
    file = WEB / (name or "index.html")
    answer = locked.get(path)  # no key: nothing here is a secret
    assert (answer.status_code, answer.content) == (200, file.read_bytes())
    assert answer.headers["Content-Type"].split(";")[0] == TYPES[file.suffix]
    assert answer.headers["Cache-Control"] == "no-cache"
    policy = answer.headers["Content-Security-Policy"]
    assert "script-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy
    again = locked.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == answer.headers["ETag"]
    assert locked.get(path, headers={"If-None-Match": f'"x", W/{answer.headers["ETag"]}'}).status_code == 304
    assert locked.get(path, headers={"If-None-Match": '"x"'}).status_code == 200
    head = locked.head(path)
    assert (head.status_code, head.content, head.headers["ETag"]) == (200, b"", answer.headers["ETag"])


@pytest.mark.parametrize(
    "path",
    ["/web/", "/web/none.js", "/web/../config.py", "/web/%2e%2e/config.py", "/web/..%2fconfig.py", "/web//etc/passwd"],
)
def test_nothing_else_is_served(locked: TestClient, path: str) -> None:
    answer = locked.get(path)
    assert answer.status_code in (401, 404)
    assert "hildanext" not in answer.text


def test_the_page_asks_nobody_else_and_runs_nothing_inline() -> None:
    for name in FILES:
        text = (WEB / name).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|eval\(|document\.write)", text), name
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:", page)
    assert re.findall(r"<script([^>]*)>", page) == [' type="module" src="/web/app.js"']
    linked = set(re.findall(r'"/web/([\w.]+)"', page))
    modules = {name: set(re.findall(r'from "\./([\w.]+)"', (WEB / name).read_text())) for name in FILES}
    assert linked | set().union(*modules.values()) | {"index.html"} == set(FILES)


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


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ({"prompt": "x", "max_new_tokens": 1000}, 400, "exceed the model's context of 64"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({}, 422, "give exactly one of 'prompt' and 'messages'"),
        ({"prompt": "x", "mode": "Q_MODE"}, 422, "'mode': Extra inputs are not permitted"),
        ({"prompt": "x", "temperature": 1.0}, 422, "'temperature': Extra inputs"),
    ],
)
def test_what_the_base_refuses(client: TestClient, body: dict[str, Any], status: int, line: str) -> None:
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


def test_the_form_knows_kinds_options_sections_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(DUMMY | {"train": {"lr": 0.5}, "server": {"api_key_file": "secret-place"}})
    with serving.client(config, jobs=open_jobs(config)) as client:
        answer = client.get("/jobs/schema")
        form = answer.json()
        assert list(form["kinds"]) == list(KINDS)
        for kind, one in form["kinds"].items():
            assert set(one["options"]) == TAKES.get(kind, set())
            assert set(one["sections"]) <= set(SECTIONS)
        assert set(form["schema"]["properties"]) == set(form["values"]) == set(SECTIONS)
        assert form["values"]["train"]["lr"] == 0.5
        assert "secret-place" not in answer.text
        # Every key that a form shows has words to it, and every value it begins with is taken back as it is.
        for name, section in form["schema"]["properties"].items():
            keys = form["schema"]["$defs"][section["$ref"].split("/")[-1]]["properties"]
            assert set(keys) == set(form["values"][name])
            assert all(one["description"] for one in keys.values())
            assert form["schema"]["$defs"][section["$ref"].split("/")[-1]]["description"]
        taken = client.post("/jobs", json={"kind": "benchmark", "config": {**form["values"], "model": {}}})
        assert taken.status_code == 201, taken.text
        client.post(f"/jobs/{taken.json()['id']}/cancel", json={})
