"""Jobs over HTTP, and scripts in the place of their commands."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hildanext.jobs import watcher
from hildanext.jobs.store import ENDED, Job, new_id
from hildanext.jobs.watcher import Jobs
from support.waiting import until

FOREVER = "import time\nprint('here', flush=True)\nwhile True: time.sleep(0.01)"
OBEDIENT = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(0))\nprint('{\"a\": 1}', flush=True)\nwhile True: time.sleep(0.01)"
STUBBORN = (
    "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('here', flush=True)\nwhile True: time.sleep(0.01)"
)


def start(client: TestClient, kind: str = "convert-wsd", **body: Any) -> dict[str, Any]:
    answer = client.post("/jobs", json={"kind": kind} | body)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    return answer.json()


def post(client: TestClient, job: dict[str, Any], what: str) -> Any:
    return client.post(f"/jobs/{job['id']}/{what}", headers={"Content-Length": "0"})


def ended(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    path = f"/jobs/{job['id']}"
    return until(lambda: (found := client.get(path).json())["state"] in ENDED and found)


def scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(watcher, "command", lambda *_, **__: [sys.executable, "-c", script])


def queued(jobs: Jobs, kind: str = "convert-wsd") -> Job:
    job_id = new_id()
    jobs.path(job_id).mkdir(parents=True)
    return jobs.store.add(job_id, kind, {"config": {}, "options": {"run": None}})[0]
