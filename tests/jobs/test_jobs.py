"""Jobs: real commands once, then the state machine with small scripts in their place."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from hildanext.cli import build_parser
from hildanext.config import Config, JobsConfig, parse_config
from hildanext.decoding.engines.dummy import DummyEngine
from hildanext.jobs import child, kinds, store, watcher
from hildanext.jobs.store import ENDED, Job, Store
from hildanext.jobs.watcher import Jobs
from hildanext.server import tail
from hildanext.server.command import open_jobs
from support import serving
from support.jobs import FOREVER, OBEDIENT, STUBBORN, ended, post, queued, scripted, start
from support.training import material
from support.waiting import until


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A server's configuration over real rows and a real base; the workspace is the test's folder."""
    monkeypatch.chdir(tmp_path)
    made = material(tmp_path, tiny_base)
    return made.model_copy(update={"engine": made.engine.model_copy(update={"order": ["dummy"]})})


@pytest.fixture
def client(config: Config) -> Iterator[TestClient]:
    with serving.client(config, jobs=open_jobs(config)) as found:
        yield found
        for job in found.get("/jobs").json()["jobs"]:
            if job["state"] in ("queued", "running"):
                found.post(f"/jobs/{job['id']}/cancel", headers={"Content-Length": "0"})
        until(lambda: all(job["state"] in ENDED for job in found.get("/jobs").json()["jobs"]))


# --- Real commands


def test_convert_then_merge(client: TestClient, config: Config) -> None:
    job = start(client, config={"wsd": {"warmup_steps": 1, "stable_steps": 1}})
    assert (job["state"], job["run"]) == ("queued", str(Path(config.paths.runs).absolute() / job["id"]))
    done = ended(client, job)
    assert (done["state"], done["exit_code"], done["note"]) == ("done", 0, None)
    assert (done["result"]["steps"], done["result"]["finished"]) == (4, True)
    rows = client.get(f"/jobs/{job['id']}/metrics").json()["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "4/4 steps" in client.get(f"/jobs/{job['id']}/logs").text
    streamed = client.get(f"/jobs/{job['id']}/metrics?follow=true").text
    assert [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith('data: {"step"')] == rows
    assert streamed.endswith('event: end\ndata: {"state": "done"}\n\n')
    merged = ended(client, start(client, "merge-topk", options={"run": job["id"], "k": 2}))
    assert merged["state"] == "done", merged["note"]
    assert (Path(job["run"]) / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_training_that_is_cancelled_resumes_where_it_was(client: TestClient) -> None:
    job = start(client, config={"wsd": {"stable_steps": 50_000}, "train": {"save_every": 50_000}})
    path = f"/jobs/{job['id']}/metrics"
    until(lambda: len(client.get(path).json()["rows"]) >= 3)
    post(client, job, "cancel")
    stopped = ended(client, job)
    assert (stopped["state"], stopped["exit_code"]) == ("cancelled", 0)
    before = client.get(path).json()["rows"]
    assert post(client, job, "resume").json()["attempt"] == 2
    until(lambda: len(client.get(path).json()["rows"]) > len(before))
    after = client.get(path).json()["rows"]
    assert [row["step"] for row in after] == list(range(1, len(after) + 1))
    assert after[: len(before)] == before


@pytest.mark.slow
def test_a_command_that_fails_says_why(client: TestClient) -> None:
    failed = ended(client, start(client, "merge-topk", options={"run": "nowhere"}))
    assert (failed["state"], failed["exit_code"]) == ("failed", 2)
    assert "nowhere" in failed["note"]


def test_the_note_of_a_failed_job_is_the_last_line_of_its_log(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(
        monkeypatch, "import sys\nprint('begun', file=sys.stderr)\nprint('no run there', file=sys.stderr)\nsys.exit(2)"
    )
    failed = ended(client, start(client, "merge-topk", options={"run": "nowhere"}))
    assert (failed["state"], failed["exit_code"], failed["note"]) == ("failed", 2, "no run there")


# --- The state machine


def test_a_result_that_is_no_json_is_none(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "print('no JSON')")
    done = ended(client, start(client))
    assert (done["state"], done["exit_code"], done["result"]) == ("done", 0, None)


def test_one_at_a_time_in_order(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, OBEDIENT)
    first, second, third = (start(client) for _ in range(3))
    until(lambda: client.get(f"/jobs/{first['id']}").json()["state"] == "running")
    never = post(client, second, "cancel").json()  # it never began
    assert (never["state"], never["started"], never["ended"] is not None) == ("cancelled", None, True)
    until(lambda: client.get(f"/jobs/{first['id']}").json()["result"])
    assert post(client, first, "cancel").status_code == 200
    until(lambda: client.get(f"/jobs/{third['id']}").json()["state"] == "running")
    assert client.get(f"/jobs/{first['id']}").json()["state"] == "cancelled"
    assert [job["id"] for job in client.get("/jobs?state=running").json()["jobs"]] == [third["id"]]
    assert client.get("/jobs?limit=1").json()["jobs"][0]["id"] == third["id"]
    until(lambda: 'hildanext_jobs{state="running"} 1.0' in client.get("/metrics").text)


def test_who_does_not_stop_is_killed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, STUBBORN)
    impatient = config.model_copy(update={"jobs": JobsConfig(cancel_s=0.0)})
    with serving.client(impatient, jobs=open_jobs(impatient)) as client:
        job = start(client)
        folder = Path(config.paths.runs) / ".jobs" / job["id"]
        until(lambda: (folder / "stdout-1.json").is_file() and (folder / "stdout-1.json").read_text())
        post(client, job, "cancel")
        assert ended(client, job)["state"] == "cancelled"
        until(lambda: not child.is_held(folder))


def test_states_that_do_not_fit_are_409(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "print('{}')")
    job = start(client)
    ended(client, job)
    assert post(client, job, "cancel").status_code == 409
    assert post(client, job, "resume").status_code == 409
    scripted(monkeypatch, FOREVER)
    other = start(client)
    until(lambda: client.get(f"/jobs/{other['id']}").json()["state"] == "running")
    assert client.delete(f"/jobs/{other['id']}").status_code == 409
    assert client.delete(f"/jobs/{job['id']}").status_code == 204
    assert client.get(f"/jobs/{job['id']}").status_code == 404
    assert not (Path("runs") / ".jobs" / job["id"]).exists()


def test_the_same_key_is_the_same_job(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "print('{}')")
    body, key = {"kind": "tokenize", "config": {"data": {"seq_len": 64}}}, {"Idempotency-Key": "k1"}
    answers = [client.post("/jobs", json=body, headers=key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = client.post("/jobs", json=body | {"kind": "prepare-data"}, headers=key)
    assert other.status_code == 409
    assert len(list((Path("runs") / ".jobs").iterdir())) == 1


def test_what_a_job_may_not_ask(client: TestClient, subtests: pytest.Subtests) -> None:
    Path("link").symlink_to("/etc")
    Path("runs/notes").touch()
    Path("runs/elsewhere").symlink_to("/etc")
    for body, line in [
        ({"kind": "serve"}, "'kind'"),
        ({"kind": "tokenize", "config": {"server": {"port": 1}}}, "'config.server'"),
        ({"kind": "tokenize", "config": {"paths": {"runs": "/tmp"}}}, "'config.paths'"),
        ({"kind": "tokenize", "config": {"jobs": {}}}, "'config.jobs'"),
        ({"kind": "tokenize", "config": {"train": {"stepz": 1}}}, "train.stepz"),
        ({"kind": "tokenize", "config": {"train": 3}}, "train"),
        ({"kind": "tokenize", "config": {"model": {"trust_remote_code": True}}}, "trust_remote_code"),
        ({"kind": "sft", "config": {"model": {"base": "/etc"}}}, "/etc is outside the workspace"),
        ({"kind": "sft", "config": {"model": {"base": "../x"}}}, "../x is outside the workspace"),
        ({"kind": "sft", "config": {"model": {"base": "link/x"}}}, "link/x is outside the workspace"),
        ({"kind": "sft", "config": {"model": {"base": "a\0b"}}}, "is outside the workspace"),
        (
            {"kind": "prepare-data", "config": {"data": {"sources": [{"kind": "instruct", "path": "/etc/passwd"}]}}},
            "outside the workspace",
        ),
        ({"kind": "tokenize", "config": {"data": {"source_tokenizer": "/etc"}}}, "outside the workspace"),
        (
            {
                "kind": "tokenize",
                "config": {"data": {"sources": [{"kind": "dolma", "path": "http://10.0.0.1/x.jsonl"}]}},
            },
            "'config.data.sources.0.path': a job may open only URLs",
        ),
        ({"kind": "sft", "config": {"model": {"base": "owner/name"}}}, "'config.model.base': a job may open only URLs"),
        ({"kind": "sft", "options": {"run": "../x"}}, "'options.run'"),
        ({"kind": "sft", "options": {"run": "jobs.sqlite"}}, "'options.run': jobs.sqlite is a file in paths.runs"),
        ({"kind": "sft", "options": {"run": "jobs.sqlite-wal"}}, "'options.run'"),
        ({"kind": "sft", "options": {"run": "notes"}}, "'options.run': notes is a file in paths.runs"),
        ({"kind": "merge-topk", "options": {"run": "elsewhere"}}, "elsewhere leads out of paths.runs"),
        ({"kind": "sft", "options": {"k": 2}}, "'options.k': sft does not take this option"),
        ({"kind": "tokenize", "options": {"run": "x"}}, "'options.run': tokenize does not take this option"),
        ({"kind": "merge-topk"}, "'options.run': merge-topk needs"),
        ({"kind": "merge-topk", "options": {"run": "x", "out": "/tmp/x"}}, "'options.out'"),
    ]:
        with subtests.test(body=body, line=line):
            answer = client.post("/jobs", json=body)
            assert answer.status_code in (400, 422)
            assert line in answer.json()["detail"]
            assert client.get("/jobs").json()["jobs"] == []


def test_secrets_stay_with_the_server(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HILDANEXT_API_KEYS", "hushed")
    scripted(monkeypatch, "import json, os\nprint(json.dumps(dict(os.environ)))")
    known = config.model_copy(update={"jobs": JobsConfig(database="sqlite:///runs/hushed.sqlite")})
    with serving.client(known, jobs=open_jobs(known)) as client:
        half = json.dumps({"kind": "tokenize", "config": {"model": {"base": "\ud800"}}})
        refused = client.post("/jobs", content=half, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400
        job = start(client, "convert-wsd", config={"train": {"lr": 2e-4}})
        seen = ended(client, job)["result"]
        assert "PATH" in seen
    written = (Path(config.paths.runs) / ".jobs" / job["id"] / "config.json").read_text()
    assert parse_config(json.loads(written)).train.lr == 2e-4
    assert not [text for text in (refused.text, json.dumps(seen), written) if "hushed" in text]


def test_the_command_line_takes_what_a_job_is_started_with(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for kind in kinds.KINDS:
        with subtests.test(kind=kind):
            given = {"run": "r", "k": 2, "split": "eval"}
            options = kinds.check_options(kind, {name: given[name] for name in kinds.TAKES.get(kind, ())})
            for resume in (False, True):
                python, dash, module, *words = kinds.command("python", kind, options, "id", tmp_path, resume=resume)
                assert (python, dash, module) == ("python", "-m", "hildanext.cli")
                taken = vars(build_parser().parse_args(words))
                assert (taken["command"], taken["json"], taken["config"]) == (kind, True, str(tmp_path / "config.json"))
                for name, value in options:
                    assert value is None or taken[name] == value
                if kind in kinds.TRAINING:
                    assert taken["resume"] is resume


# --- Logs and metrics


def test_a_log_is_followed_while_it_grows(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "while not os.path.exists('go'): time.sleep(0.01)"
    scripted(monkeypatch, f"import os, sys, time\nprint('one', file=sys.stderr, flush=True)\n{wait}\nsys.exit('two')")
    with (
        serving.running(config, jobs=open_jobs(config)) as (url, _),
        httpx2.Client(base_url=url) as client,
    ):
        job = client.post("/jobs", json={"kind": "tokenize"}).json()["id"]
        with client.stream("GET", f"/jobs/{job}/logs?follow=true") as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert next(lines) == 'data: "one"'  # and the job still runs
            Path("go").touch()
            assert list(lines) == ['data: "two"', "event: end", 'data: {"state": "failed"}']


def test_of_what_is_long_the_end_is_shown(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "print('{}')")
    job = start(client, "convert-wsd")
    ended(client, job)
    log, metrics = Path("runs") / ".jobs" / job["id"] / "log.txt", Path(job["run"]) / "metrics.jsonl"
    metrics.parent.mkdir(exist_ok=True)
    log.write_text("".join(f"line {n}\n" for n in range(100_000)))
    metrics.write_text('{"step": 1}\n{"step": 2, "loss": NaN}\nnonsense\n{"step": 3}\n{"st')
    path = f"/jobs/{job['id']}"
    answer = client.get(f"{path}/logs?tail=22")
    assert answer.text == "line 99998\nline 99999\n"
    assert int(answer.headers["X-Skipped-Bytes"]) == log.stat().st_size - 22
    assert client.get(f"{path}/logs?tail=23").text == answer.text  # whole lines only
    assert len(client.get(f"{path}/logs").content) <= 1_000_000
    rows = [{"step": 1}, {"step": 2, "loss": None}, {"step": 3}]
    assert client.get(f"{path}/metrics").json() == {"rows": rows, "skipped_bytes": 0}
    streamed = client.get(f"{path}/metrics?follow=true").text
    assert [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith('data: {"step"')] == rows
    followed = client.get(f"{path}/logs?follow=true").text
    assert followed.count('data: "line ') == 100_000  # in several pieces
    assert client.get(f"{path}/logs?tail=0").status_code == 422
    metrics.unlink()
    metrics.symlink_to("/etc/hostname")
    for query in ("", "?follow=true"):
        assert client.get(f"{path}/metrics{query}").status_code == 400


# --- What jobs may not share


def test_a_run_is_one_training_s(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, FOREVER)
    body, key = {"kind": "convert-wsd", "options": {"run": "r"}}, {"Idempotency-Key": "k"}
    first = client.post("/jobs", json=body, headers=key).json()
    assert client.post("/jobs", json=body, headers=key).status_code == 200  # the same one
    for kind in ("convert-wsd", "sft"):
        answer = client.post("/jobs", json={"kind": kind, "options": {"run": "r"}})
        assert answer.status_code == 409
        assert f"run 'r' belongs to job {first['id']}" in answer.json()["detail"]
    post(client, first, "cancel")
    ended(client, first)
    second = client.post("/jobs", json=body).json()
    assert post(client, first, "resume").status_code == 409
    post(client, second, "cancel")
    ended(client, second)
    assert post(client, first, "resume").status_code == 200


def test_one_gpu_is_not_fought_for(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "print('{}')")
    engine = DummyEngine(config, {})
    engine.device = "cuda:0"
    plain = {"kind": "convert-wsd", "config": {"model": {"device": "auto"}}}
    jobs = open_jobs(config)
    with serving.client(config, engine, jobs=jobs) as client:
        answer = client.post("/jobs", json=plain)
        assert (answer.status_code, "jobs.share_gpu" in answer.json()["detail"]) == (409, True)
        on_cpu = start(client, config={"model": {"device": "cpu"}})
        assert ended(client, on_cpu)["state"] == "done"
        early = queued(jobs)  # as one that came while the model was loading
        (jobs.path(early.id) / "config.json").write_text(json.dumps({"model": {"device": "auto"}}))
        later = start(client, "tokenize")
        assert ended(client, later)["state"] == "done"  # it did not wait for that one
        shown = client.get(f"/jobs/{early.id}").json()
        assert (shown["state"], "uses the GPU" in shown["waits_because"]) == ("queued", True)
        engine.device = "cpu"
        assert ended(client, {"id": early.id})["state"] == "done"
        assert jobs.store.move(jobs.store.get(early.id), "failed")
        engine.device = "cuda:0"
        assert post(client, {"id": early.id}, "resume").status_code == 409
    shared = config.model_copy(update={"jobs": JobsConfig(share_gpu=True)})
    with serving.client(shared, engine, jobs=open_jobs(shared)) as client:
        assert ended(client, start(client, config={"model": {"device": "auto"}}))["state"] == "done"


# --- Faults


def test_a_stream_of_a_job_that_is_deleted_ends_with_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = open_jobs(config)
    job = queued(jobs)
    (jobs.path(job.id) / "log.txt").write_text("one\n")

    async def all_of_it() -> tuple[str, str]:
        events = tail.follow(jobs, job.id, jobs.path(job.id) / "log.txt")
        first = await anext(events)
        get, looks = jobs.store.get, []

        def locked_once(job_id: str) -> Job:
            looks.append(job_id)
            if len(looks) == 1:
                raise store.StoreError("locked")
            return get(job_id)

        jobs.store.move(job, "cancelled")
        jobs.store.delete(job.id)
        monkeypatch.setattr(jobs.store, "get", locked_once)
        return first, await anext(events)

    first, second = asyncio.run(all_of_it())
    assert (first, second) == (
        'data: "one"\n\n',
        'event: error\ndata: {"detail": "no such job", "status": 404}\n\n',
    )


def test_a_look_that_fails_in_a_way_nobody_foresaw_is_shown(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "print('{}')")

    def broken(text: str) -> None:
        raise OSError("nobody reads it")

    with monkeypatch.context() as patch:
        patch.setattr(watcher, "say", broken)
        patch.setattr(watcher.Store, "counts", lambda self: {}["nothing"])
        until(lambda: client.get("/health").json()["jobs"]["trouble"] == "KeyError: 'nothing'")
    until(lambda: client.get("/health").json()["jobs"]["trouble"] is None)
    assert ended(client, start(client, "tokenize"))["state"] == "done"


@pytest.fixture
def watched(config: Config) -> Iterator[Jobs]:
    """Jobs without a server and without the thread: the test looks when it likes."""
    jobs = open_jobs(config)
    yield jobs
    for job in jobs.store.list(("running",)):
        jobs.store.move(job, "running", cancel_requested=True)
    until(lambda: jobs.tick() or not jobs.store.list(("running",)))
    for process in jobs.backend.processes.values():  # what another one settled
        process.wait()


def test_killed_jobs_are_interrupted_and_go_on(watched: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, FOREVER)
    job = queued(watched)
    started = watched.path(job.id) / "started-1.json"
    until(lambda: watched.tick() or (started.is_file() and started.read_text()))
    os.killpg(json.loads(started.read_text())["group"], signal.SIGKILL)
    until(lambda: watched.tick() or watched.store.get(job.id).state != "running")
    found = watched.store.get(job.id)
    assert (found.state, found.note) == ("interrupted", watcher.INTERRUPTED)
    scripted(monkeypatch, "print('{}')")
    assert watched.store.move(found, "queued", attempt=2)
    until(lambda: watched.tick() or watched.store.get(job.id).state == "done")


def test_a_server_that_comes_back_finds_its_jobs(
    watched: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = Path("ran").absolute()
    scripted(
        monkeypatch,
        f"open({str(mark)!r}, 'a').write('x')\nimport os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('{{}}')",
    )
    running, waiting = queued(watched), queued(watched)
    until(lambda: watched.tick() or mark.exists())
    later = open_jobs(config)  # another process would see the same: nothing of `watched` is used
    for _ in range(3):
        later.tick()
    assert [later.store.get(job.id).state for job in (running, waiting)] == ["running", "queued"]
    Path("go").touch()
    until(lambda: later.tick() or later.store.get(waiting.id).state == "done")
    assert later.store.get(running.id).state == "done"
    assert mark.read_text() == "xx"  # each ran once


def test_a_job_claimed_but_never_begun_begins_once(watched: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = Path("ran").absolute()
    scripted(monkeypatch, f"open({str(mark)!r}, 'a').write('x')\nprint('{{}}')")
    job = queued(watched)
    assert watched.store.move(job, "running")  # and the server dies here
    until(lambda: watched.tick() or watched.store.get(job.id).state == "done")
    assert mark.read_text() == "x"


def test_an_attempt_never_runs_twice(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    command = [sys.executable, "-c", f"open({str(mark)!r}, 'a').write('x')"]
    assert [child.run(tmp_path, 1, command) for _ in range(2)] == [0, child.REFUSED]
    assert child.run(tmp_path, 2, command) == 0
    assert mark.read_text() == "xx"
    assert not child.is_held(tmp_path)


# Runs a command as `child` does, and gets SIGTERM just before the command starts.
EARLY = f"""
import os, signal, subprocess, sys
from pathlib import Path
from hildanext.jobs import child
popen = subprocess.Popen
def late(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return popen(*arguments, **options)
child.subprocess.Popen = late
print(child.run(Path(sys.argv[1]), 1, [sys.executable, "-S", "-c", {FOREVER!r}]))
"""


def test_a_signal_that_comes_before_the_command_reaches_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", EARLY, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.stdout == f"-{int(signal.SIGTERM)}\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not tell a process that its parent is dead")
def test_a_command_does_not_outlive_who_notes_its_end(watched: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, FOREVER)
    job = queued(watched)
    output = watched.path(job.id) / "stdout-1.json"
    until(lambda: watched.tick() or (output.is_file() and output.read_text()))
    watched.backend.processes[job.id, 1].kill()
    until(lambda: watched.tick() or watched.store.get(job.id).state == "interrupted")
    assert not child.is_held(watched.path(job.id))


def test_two_who_claim_the_same_job(watched: Jobs, config: Config) -> None:
    job = queued(watched)
    other = open_jobs(config).store
    assert [watched.store.move(job, "running"), other.move(job, "running")] == [True, False]


def test_a_locked_database_is_503_and_then_all_is_well(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "BUSY_S", 0.05)
    scripted(monkeypatch, "print('{}')")
    with serving.client(config, jobs=open_jobs(config)) as client:
        lock = sqlite3.connect(Path(config.paths.runs) / "jobs.sqlite", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        answer = client.post("/jobs", json={"kind": "tokenize"})
        assert answer.status_code == 503
        assert "database is locked" in answer.json()["detail"]
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200
        lock.execute("ROLLBACK")
        lock.close()
        assert client.get("/jobs").json()["jobs"] == []
        assert not any((Path(config.paths.runs) / ".jobs").iterdir())
        assert ended(client, start(client, "tokenize"))["state"] == "done"


def test_databases_that_cannot_be_had(config: Config) -> None:
    for url, line in (("nonsense", "'jobs.database'"), ("nosuch://x", "'jobs.database'"), ("mysql://x", "MySQLdb")):
        with pytest.raises(store.UsageError, match=line):
            Store(url)
    with pytest.raises(store.StoreError, match="job database"):
        Store("sqlite:////nowhere/at/all.sqlite")


def test_a_storm_of_cancels_and_resumes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "open('ran', 'a').write('x')\n" + OBEDIENT)
    busy = config.model_copy(update={"jobs": JobsConfig(at_once=3)})
    headers = {"Content-Length": "0"}

    def bother(url: str, ids: list[str], seed: int) -> set[int]:
        rng, seen = random.Random(seed), set()
        with httpx2.Client(base_url=url) as client:
            for _ in range(40):
                what, job = rng.choice(["cancel", "cancel", "resume", ""]), rng.choice(ids)
                path = f"/jobs/{job}/{what}" if what else f"/jobs/{job}"
                seen.add(client.request("POST" if what else "GET", path, headers=headers).status_code)
        return seen

    with serving.running(busy, jobs=open_jobs(busy)) as (url, _), httpx2.Client(base_url=url) as client:
        ids = [client.post("/jobs", json={"kind": "convert-wsd"}).json()["id"] for _ in range(8)]
        with ThreadPoolExecutor(6) as pool:
            seen = set().union(*pool.map(lambda seed: bother(url, ids, seed), range(6)))
        assert seen == {200, 409}
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200
        for job in ids:
            client.post(f"/jobs/{job}/cancel", headers=headers)
        until(lambda: all(job["state"] == "cancelled" for job in client.get("/jobs").json()["jobs"]))
        jobs = client.get("/jobs").json()["jobs"]
    folders = [Path(config.paths.runs) / ".jobs" / job["id"] for job in jobs]
    assert len(jobs) == 8
    assert not [folder for folder in folders if child.is_held(folder)]
    began = [len(list(folder.glob("started-*.json"))) for folder in folders]
    assert all(n <= job["attempt"] for n, job in zip(began, jobs, strict=True))
    assert len(Path("ran").read_text()) <= sum(began)  # an attempt ran once, or was stopped before it could
