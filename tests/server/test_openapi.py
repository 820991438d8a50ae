"""Schemathesis over the OpenAPI document: no 5xx, and no answer that is not in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hildanext.config import parse_config
from hildanext.decoding.engines import open_engine
from hildanext.jobs import watcher
from hildanext.server.command import open_jobs
from support import serving

pytest.importorskip("schemathesis")


@pytest.mark.parametrize("examples", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_the_document_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watcher, "command", lambda *_, **__: [sys.executable, "-c", "print('{}')"])
    # A client that gives no time (deadline_s 5e-324) is answered with 504, as it asked for.
    expected = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]\n'
    (tmp_path / "schemathesis.toml").write_text(expected, encoding="utf-8")
    config = parse_config({"engine": {"order": ["dummy"]}, "server": {"base": False}})
    with serving.running(config, open_engine, None, open_jobs(config)) as (url, worker):
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--seed", "1"]
        # A schema cannot say everything (exactly one of two keys): a refusal of what fits it is no fault.
        command += ["--max-examples", str(examples), "--checks", "all", "--exclude-checks", "positive_data_acceptance"]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout[-5000:]
        assert "generated" in found.stdout
        assert worker.state == "ready"
