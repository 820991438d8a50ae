"""Faults from outside, on a real server in a process of its own: SIGTERM, kill -9, a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hildanext.config import Config
from hildanext.jobs import watcher
from hildanext.jobs.child import is_held
from hildanext.jobs.store import ENDED
from hildanext.training.checkpoint import list_checkpoints, verify
from support import serving
from support.models import write_converted
from support.training import material
from support.waiting import until

LONG = {"wsd": {"stable_steps": 50_000}}  # a training that is still there when its time has come


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A converted checkpoint with room for an answer of some thousand passes."""
    engine = {"order": ["transformers"], "runtime": "eager"}
    return write_converted(tmp_path_factory.mktemp("talkative"), context=4096, engine=engine)


# --- A signal in the middle of an answer


def is_refused(port: int) -> bool:
    """Whether nobody listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def ask(n_tokens: int) -> dict[str, Any]:
    """A request that takes a pass a token."""
    return {"prompt": "Once upon", "max_new_tokens": n_tokens, "tau_mask": 1.0, "tau_edit": None, "stream": True}


def test_kill_9_and_then_sigterm_in_the_middle_of_a_stream(talkative: Config, tmp_path: Path) -> None:
    port = serving.free_port()
    with serving.process(talkative, tmp_path, port=port) as (url, server):
        with httpx2.stream("POST", f"{url}/generate", json=ask(4000)) as answer:
            pieces = answer.iter_text()
            seen = next(pieces)
            server.kill()
            # Cut off in the middle of a chunked body: no client can take it for the end of the answer.
            with pytest.raises(httpx2.TransportError):
                seen += "".join(pieces)
        server.wait()
        assert server.poll() == -signal.SIGKILL
        assert "event: done" not in seen
    patient = talkative.model_copy(update={"server": talkative.server.model_copy(update={"drain_s": 600})})
    with serving.process(patient, tmp_path, port=port) as (url, server):  # nothing it left behind is in the way
        with httpx2.stream("POST", f"{url}/generate", json=ask(2000)) as answer:
            pieces = answer.iter_text()
            seen = next(pieces)
            server.send_signal(signal.SIGTERM)
            until(lambda: is_refused(port))  # it is stopping, and nothing more of the answer was taken yet
            seen += "".join(pieces)
        server.wait()
        assert server.poll() == 0
        assert seen.count("event: done") == 1  # what runs is finished


def test_what_is_not_finished_in_time_is_cut_and_the_end_is_good(talkative: Config, tmp_path: Path) -> None:
    hasty = talkative.model_copy(update={"server": talkative.server.model_copy(update={"drain_s": 0})})
    with serving.process(hasty, tmp_path) as (url, server):
        with httpx2.stream("POST", f"{url}/generate", json=ask(4000)) as answer:
            pieces = answer.iter_text()
            seen = next(pieces)
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx2.TransportError):
                seen += "".join(pieces)
        server.wait()
        assert server.poll() == 0
        assert "event: done" not in seen


# --- Jobs


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Config:
    """A server of jobs over real rows and a real base."""
    made = material(tmp_path, tiny_base)
    return made.model_copy(update={"engine": made.engine.model_copy(update={"order": ["dummy"]})})


def start(client: httpx2.Client, kind: str = "convert-wsd", **body: Any) -> str:
    """A new job's id."""
    answer = client.post("/jobs", json={"kind": kind} | body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def tell(client: httpx2.Client, job: str, what: str) -> dict[str, Any]:
    answer = client.post(f"/jobs/{job}/{what}", headers={"Content-Length": "0"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def steps(client: httpx2.Client, job: str) -> list[int]:
    """The steps in the metrics of a training."""
    return [row["step"] for row in client.get(f"/jobs/{job}/metrics").json()["rows"]]


def ended(client: httpx2.Client, job: str) -> dict[str, Any]:
    return until(lambda: (found := client.get(f"/jobs/{job}").json())["state"] in ENDED and found)


def resume_and_cancel(client: httpx2.Client, job: str) -> None:
    """Resume a training, see that it gets further than it was, and stop it; every step is there once."""
    before = steps(client, job)
    assert tell(client, job, "resume")["attempt"] == 2
    until(lambda: len(steps(client, job)) > len(before))
    tell(client, job, "cancel")
    assert ended(client, job)["exit_code"] == 0
    after = steps(client, job)
    assert after == list(range(1, len(after) + 1))


@pytest.mark.slow
def test_kill_9_of_the_server_and_of_its_job(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / ".jobs"
    with serving.process(config, tmp_path) as (url, server), httpx2.Client(base_url=url) as client:
        training = start(client, config=LONG)
        until(lambda: len(steps(client, training)) >= 4)
        waiting = start(client, "merge-topk", options={"run": training, "k": 1})
        server.kill()
        os.killpg(json.loads((folder / training / "started-1.json").read_text())["group"], signal.SIGKILL)
        server.wait()
    until(lambda: not is_held(folder / training))
    with serving.process(config, tmp_path) as (url, _), httpx2.Client(base_url=url) as client:
        lost = ended(client, training)
        assert (lost["state"], lost["note"], lost["attempt"]) == ("interrupted", watcher.INTERRUPTED, 1)
        merged = ended(client, waiting)  # it waited through it all, and the run's checkpoint is whole
        assert (merged["state"], merged["attempt"]) == ("done", 1), merged["note"]
        resume_and_cancel(client, training)
    attempts = [len(list((folder / job).glob("started-*.json"))) for job in (training, waiting)]
    assert attempts == [2, 1]


def small_disk(place: Path, megabytes: int) -> tuple[str, ...]:
    """What starts a command with a small disk at `place` that only it and its children see; skips where it cannot be had."""
    place.mkdir()
    namespace = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    mount = f"mount -t tmpfs -o size={megabytes}m none {place}"
    try:
        found = subprocess.run([*namespace, "sh", "-c", mount], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if found.returncode != 0:
        pytest.skip(f"no mount namespace here: {found.stderr.strip()}")
    return (*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh")


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces are Linux's")
def test_a_full_disk_while_a_job_writes(config: Config, tmp_path: Path) -> None:
    disk = small_disk(tmp_path / "runs", 16)
    with (
        serving.launched(config, tmp_path, disk) as (url, server),
        httpx2.Client(base_url=url) as client,
    ):
        runs = Path(f"/proc/{server.pid}/root{tmp_path}/runs")
        training = start(client, config=LONG)
        until(lambda: len(steps(client, training)) >= 4)
        fill(runs / "filler")
        until(lambda: not is_held(runs / ".jobs" / training))
        fill(runs / "filler-2")  # the half of a checkpoint that it took away again
        refused = client.post("/jobs", json={"kind": "tokenize"})
        assert (refused.status_code, refused.json()) == (503, {"detail": "No space left on device"})
        assert "Retry-After" in refused.headers
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200
        assert [path.name for path in (runs / ".jobs").iterdir()] == [training]  # it left nothing behind
        for name in ("filler", "filler-2"):
            (runs / name).unlink()
        lost = ended(client, training)
        assert lost["state"] in ("failed", "interrupted")  # with room for its exit code, or without
        assert "disk" in lost["note"] or "No space left" in lost["note"]
        log = client.get(f"/jobs/{training}/logs").text
        assert "No space left" in log or not log.endswith("\n")  # the line, or as much of it as there was room for
        checkpoints = list_checkpoints(runs / training / "checkpoints")
        assert [verify(path)["step"] for _, path in checkpoints] == [step for step, _ in checkpoints] != []
        resume_and_cancel(client, training)
