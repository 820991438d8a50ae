"""The page's files: what is served, and what they may not do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from hildanext.config import parse_config, schema
from hildanext.jobs.kinds import KINDS, SECTIONS, TAKES, Options
from hildanext.server.command import open_jobs
from support import serving
from support.serving import dummy

WEB = Path(__file__).parents[2] / "src" / "hildanext" / "server" / "web"


FILES = sorted(path.name for path in WEB.iterdir())


TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def locked() -> Iterator[TestClient]:
    with serving.client(dummy(), keys=[b"secret"]) as found:
        yield found


def test_every_file_of_the_page(locked: TestClient, subtests: pytest.Subtests) -> None:
    for name in ["", *FILES]:
        with subtests.test(name=name):
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


def test_nothing_else_is_served(locked: TestClient, subtests: pytest.Subtests) -> None:
    for path in [
        "/web/",
        "/web/none.js",
        "/web/../config.py",
        "/web/%2e%2e/config.py",
        "/web/..%2fconfig.py",
        "/web//etc/passwd",
    ]:
        with subtests.test(path=path):
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


def test_plain_names_are_of_things_that_exist() -> None:
    defs, sections = schema()["$defs"], schema()["properties"]
    keys = {f"{name}.{key}" for name in SECTIONS for key in defs[sections[name]["$ref"].split("/")[-1]]["properties"]}
    named = re.findall(r'^  "?([\w.-]+)"?: ', (WEB / "names.js").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= {*KINDS, *SECTIONS, *Options.model_fields, *keys}
    assert {*KINDS, *SECTIONS, *Options.model_fields} <= set(named)


def test_the_form_knows_kinds_options_sections_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(
        {"engine": {"order": ["dummy"]}, "train": {"lr": 0.5}, "server": {"api_key_file": "secret-place"}}
    )
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
