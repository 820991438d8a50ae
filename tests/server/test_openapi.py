"""Schemathesis over the OpenAPI document: no 5xx, and no answer that is not in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from hildanext.config import parse_config
from hildanext.decoding.engines import open_engine
from hildanext.jobs import watcher
from hildanext.server.command import open_jobs
from support import serving
from support.serving import dummy

pytest.importorskip("schemathesis")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("examples", "key"), [(2, None), pytest.param(20, None, marks=SLOW), pytest.param(20, "right", marks=SLOW)]
)
def test_the_document_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int, key: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watcher, "command", lambda *_, **__: [sys.executable, "-c", "print('{}')"])
    # A client that gives no time (deadline_s 5e-324) is answered with 504, as it asked for.
    expected = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]\n'
    (tmp_path / "schemathesis.toml").write_text(expected, encoding="utf-8")
    config = parse_config({"engine": {"order": ["dummy"]}, "server": {"base": False}})
    keys, header = ([], []) if key is None else ([key.encode()], ["--header", f"Authorization: Bearer {key}"])
    with serving.running(config, open_engine, keys, open_jobs(config)) as (url, worker):
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--seed", "1"]
        # A schema cannot say everything (which model is served): a refusal of what fits it is no fault.
        command += ["--max-examples", str(examples), "--checks", "all", "--exclude-checks", "positive_data_acceptance"]
        command += ["--suppress-health-check", "too_slow"]  # how fast this machine makes up requests is no fault
        found = subprocess.run(command + header, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout[-5000:]
        assert "generated" in found.stdout
        assert worker.state == "ready"


def test_the_document_names_the_key_and_exactly_one_prompt() -> None:
    for keys in ([], [b"right"]):
        with serving.client(dummy(), keys=keys) as client:
            document = client.get("/openapi.json", headers={"Authorization": "Bearer right"}).json()
            schemes = document["components"].get("securitySchemes")
            assert schemes == ({"key": {"type": "http", "scheme": "bearer"}} if keys else None)
            assert document.get("security") == ([{"key": []}] if keys else None)
            for path, operations in document["paths"].items():
                needs_key = client.get(path).status_code == 401
                assert all(
                    (operation.get("security") == []) == (bool(keys) and not needs_key)
                    for operation in operations.values()
                )
            for name in ("GenerateBody", "BaseBody", "TokenizeBody"):
                validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}"} | document)
                for body in (
                    {"prompt": "a"},
                    {"messages": [{"role": "user", "content": "a"}]},
                    {"prompt": "a", "messages": None},
                ):
                    assert validator.is_valid(body), (name, body)
                for body in ({}, {"prompt": "a", "messages": []}, {"prompt": None}, {"prompt": "a", "unheard_of": 1}):
                    assert not validator.is_valid(body), (name, body)
