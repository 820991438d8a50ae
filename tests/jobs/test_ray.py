"""The Ray backend: on a stand-in for a cluster, and on a real one of one node that is started, killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hildanext.config import Config, ConfigError, parse_config
from hildanext.errors import UsageError
from hildanext.jobs import child
from hildanext.jobs.backend import BackendError
from hildanext.jobs.store import Job
from hildanext.jobs.watcher import Jobs
from hildanext.server import command
from hildanext.server.command import open_jobs
from support import serving
from support.jobs import OBEDIENT, ended, queued, scripted, start
from support.training import material
from support.waiting import until


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


class Cluster:
    """`ray start --head` with two CPUs, in a folder of its own."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie in it
        self.ports = free_ports(5)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    def start(self) -> None:
        names = ["--port", "--dashboard-port", "--ray-client-server-port"]
        names += ["--dashboard-agent-listen-port", "--dashboard-agent-grpc-port"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--temp-dir", self.folder]
        command += [f"{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
        command += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=80000000"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with open(Path(self.folder) / "out.txt", "wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Some earlier Ray of this user may have left a token, which then would be asked for.
                env=env | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
            )

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (Path(self.folder) / "out.txt").read_text()
            try:
                with urllib.request.urlopen(f"{self.address}/api/version") as found:
                    return found.status == 200
            except OSError:
                return False

        until(answers)

    def kill(self) -> None:
        """As when the head node loses its power."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def real() -> Iterator[Cluster]:
    pytest.importorskip("ray.job_submission", reason="ray is not installed: pip install 'hildanext[ray]'")
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster that runs; the stand-in takes the place of Ray's client."""
    if request.param == "real":
        yield request.getfixturevalue("real")
        return
    pytest.importorskip("ray.job_submission", reason="ray is not installed: pip install 'hildanext[ray]'")
    from hildanext.jobs import ray
    from support.ray import StandIn

    cluster = StandIn()
    cluster.start()
    monkeypatch.setattr(ray, "Client", lambda address: cluster)
    yield cluster
    cluster.kill()


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any) -> Config:
    return on_cluster(tmp_path, tiny_base, monkeypatch, cluster)


def on_cluster(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any) -> Config:
    """A server's configuration whose jobs the cluster runs."""
    monkeypatch.chdir(folder)
    jobs = {"backend": "ray", "ray_address": cluster.address, "at_once": 2}
    return parse_config(material(folder, base).model_dump(mode="json") | {"jobs": jobs, "engine": {"order": ["dummy"]}})


@pytest.fixture
def watched(config: Config) -> Iterator[Jobs]:
    """Jobs without a server and without the thread: the test looks when it likes."""
    jobs = open_jobs(config)
    yield jobs
    for job in jobs.store.list(("queued",)):
        jobs.store.move(job, "cancelled")
    for job in jobs.store.list(("running",)):
        jobs.store.move(job, "running", cancel_requested=True)
    until(lambda: look(jobs) or not jobs.store.list(("running",)))


def look(jobs: Jobs) -> None:
    """One look; a cluster that is busy and does not answer in time is asked again at the next."""
    with contextlib.suppress(BackendError):
        jobs.tick()


def ready(jobs: Jobs, config: Config, kind: str = "tokenize") -> Job:
    """A queued job with all that its process reads."""
    job = queued(jobs, kind)
    (jobs.path(job.id) / "config.json").write_text(config.model_dump_json())
    return job


def marked(path: Path, then: str) -> str:
    """A script that counts its runs in a file."""
    return f"open({str(path)!r}, 'a').write('x')\n{then}"


def until_state(jobs: Jobs, job: Job, state: str) -> Job:
    def reached() -> Job | None:
        look(jobs)
        found = jobs.store.get(job.id)
        assert found.state in ("queued", "running", state), found
        return found if found.state == state else None

    return until(reached)


@pytest.mark.slow
def test_a_real_job_is_done(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, real: Cluster) -> None:
    config = on_cluster(tmp_path, tiny_base, monkeypatch, real)
    pairs = [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}."} for n in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with serving.client(config, jobs=open_jobs(config)) as client:
        source = {"kind": "instruct", "path": "pairs.jsonl"}  # found in the server's folder
        job = start(client, "prepare-data", config={"data": {"sources": [source], "eval_share": 0.001}})
        done = ended(client, job)
        assert (done["state"], done["exit_code"], done["note"]) == ("done", 0, None)
        assert done["backend_id"] == f"hildanext-{job['id']}-1"
        assert sum(done["result"]["documents"].values()) == len(pairs)
        assert "'sft_eval' is empty" in client.get(f"/jobs/{job['id']}/logs").text
        assert client.get("/health").json()["jobs"] == {"backend": "ray", "trouble": None}


def test_cancel_one_that_runs_and_one_that_waits(
    watched: Jobs, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    scripted(monkeypatch, marked(mark, OBEDIENT))
    greedy = watched.backend.config.model_copy(update={"ray_num_cpus": 2.0})
    monkeypatch.setattr(watched.backend, "config", greedy)
    first, second = ready(watched, config), ready(watched, config)
    output = watched.path(first.id) / "stdout-1.json"
    until(lambda: look(watched) or (output.is_file() and output.read_text()))
    # No CPU is left: Ray has the second one, and it has not begun.
    assert watched.backend.look(watched.store.get(second.id), watched.path(second.id)).state == "waiting"
    for job in (second, first):
        assert watched.store.move(watched.store.get(job.id), "running", cancel_requested=True)
    until(lambda: look(watched) or watched.store.get(second.id).state == "cancelled")
    assert until_state(watched, first, "cancelled").exit_code == 0  # it had the time to end as it likes
    third = ready(watched, config)  # the CPUs come free only after what waited has had its turn
    until(lambda: look(watched) or (watched.path(third.id) / "started-1.json").is_file())
    until(lambda: mark.read_text() == "xx")
    assert not (watched.path(second.id) / "stdout-1.json").exists()


def test_a_server_that_comes_back_finds_its_jobs(
    watched: Jobs, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, go = tmp_path / "ran", tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    seen = "import json\nprint(json.dumps({name: os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')}))"
    scripted(monkeypatch, marked(mark, f"{wait}\n{seen}"))
    running, claimed, sent = (ready(watched, config) for _ in range(3))
    until(lambda: look(watched) or mark.exists())
    # One server died after it had claimed a job, one after Ray had it too.
    watched.backend.start(watched.store.get(sent.id), watched.path(sent.id), watched_command(watched, sent))
    for job in (claimed, sent):
        watched.store.move(job, "running", backend_id=watched.backend.backend_id(job))
    later = open_jobs(config)  # another process would see the same: nothing of `watched` is used
    look(later)
    assert later.store.get(running.id).state == "running"
    later.backend.start(later.store.get(sent.id), later.path(sent.id), watched_command(later, sent))
    go.touch()
    for job in (running, claimed, sent):
        until_state(later, job, "done")
    assert mark.read_text() == "xxx"  # each ran once
    seen = json.loads((later.path(running.id) / "stdout-1.json").read_text())
    assert seen == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def watched_command(jobs: Jobs, job: Job) -> list[str]:
    """The command line that the loop would submit."""
    made: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.backend, "start", lambda job, folder, command: made.append(command))
        jobs._start(job)
    return made[0]


class Door(socketserver.ThreadingTCPServer):
    """A way to the dashboard that can be closed."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, there: str, port: int = 0) -> None:
        class Pipe(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", int(there.rpartition(":")[2]))) as far:
                    back = threading.Thread(target=copy, args=(far, self.request))
                    back.start()
                    copy(self.request, far)
                    back.join()

        super().__init__(("127.0.0.1", port), Pipe)
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def copy(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(65_536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)


@pytest.mark.slow
def test_while_ray_does_not_answer_nothing_changes(
    real: Cluster,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster, config = real, on_cluster(tmp_path, tiny_base, monkeypatch, real)
    go = tmp_path / "go"
    scripted(monkeypatch, f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nprint('{{}}')")
    (port,) = free_ports(1)
    changed = config.jobs.model_copy(update={"ray_address": f"http://127.0.0.1:{port}", "at_once": 1})
    config = config.model_copy(update={"jobs": changed})
    jobs = open_jobs(config)
    with serving.client(config, jobs=jobs) as client:
        until(lambda: client.get("/jobs").json()["trouble"])
        job, waiting = start(client, "tokenize"), start(client, "tokenize")
        states = lambda: {found["id"]: found["state"] for found in client.get("/jobs").json()["jobs"]}  # noqa: E731
        looks(jobs)
        assert states() == {job["id"]: "queued", waiting["id"]: "queued"}
        door = Door(cluster.address, port)
        until(lambda: states()[job["id"]] == "running" and Path(f"runs/.jobs/{job['id']}/started-1.json").exists())
        assert client.get("/jobs").json()["trouble"] is None
        door.close()
        trouble = until(lambda: client.get("/jobs").json()["trouble"])
        assert trouble.startswith(f"Ray at http://127.0.0.1:{port} does not answer")
        assert client.get("/health").json()["jobs"] == {"backend": "ray", "trouble": trouble}
        looks(jobs)
        assert states() == {job["id"]: "running", waiting["id"]: "queued"}
        go.touch()  # what ended can be seen without Ray; what waits cannot begin
        assert ended(client, job)["state"] == "done"
        assert states()[waiting["id"]] == "queued"
        door = Door(cluster.address, port)
        assert ended(client, waiting)["state"] == "done"
        door.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jobs: ")]
    assert ["does not answer" in line for line in lines] == [True, False, True, False]  # said once each


def looks(jobs: Jobs) -> None:
    """Let the loop look a few times."""
    seen: list[int] = []
    original = jobs.tick
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "tick", lambda: seen.append(1) or original())
        until(lambda: jobs.wake() or len(seen) > 2)


def test_what_the_cluster_cannot_run_says_why(watched: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched.backend, "workspace", Path("/nowhere/at all"))
    failed = until_state(watched, job := ready(watched, config), "failed")
    assert "can't cd to /nowhere/at all" in failed.note or "/nowhere/at all: No such file" in failed.note
    assert "under the same paths" in failed.note
    assert "/nowhere/at all" in (watched.path(job.id) / "log.txt").read_text()


def test_a_cluster_that_forgot_a_job(
    watched: Jobs, config: Config, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    scripted(monkeypatch, marked(mark, "import time\nwhile True: time.sleep(0.01)"))
    job = ready(watched, config)
    until(lambda: look(watched) or mark.exists())
    cluster.kill()
    with pytest.raises(BackendError, match="does not answer"):
        watched.tick()
    assert watched.store.get(job.id).state == "running"
    until(lambda: not child.is_held(watched.path(job.id)))  # Ray ends it when its node is gone
    cluster.start()
    lost = until_state(watched, job, "interrupted")
    assert "was it restarted?" in lost.note
    scripted(monkeypatch, marked(mark, "print('{}')"))
    assert watched.store.move(lost, "queued", attempt=2)
    done = until_state(watched, job, "done")
    assert (done.backend_id, mark.read_text()) == (f"hildanext-{job.id}-2", "xx")


def test_what_ray_answers_instead(watched: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that cannot be sent waits, and one line says why; an error of Ray's is told by its last line with words."""
    scripted(monkeypatch, "print('{}')")
    job = ready(watched, config)

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("Request failed:\n  no room for it\n  ----")

    with watched.backend._client() as client:
        pass
    with monkeypatch.context() as patch:
        patch.setattr(client, "submit_job", refused)
        with pytest.raises(BackendError, match=r"^Ray at http://127\.0\.0\.1:\d+ failed:   no room for it$"):
            watched.tick()
    with monkeypatch.context() as patch:
        patch.setattr(client, "get_job_info", refused)
        patch.setattr(client, "list_jobs", lambda: [SimpleNamespace(submission_id=f"hildanext-{job.id}-1")])
        with pytest.raises(BackendError, match="no room for it"):
            watched.tick()
    assert until_state(watched, job, "done").exit_code == 0


def test_trouble_is_shown_until_it_is_over(config: Config, cluster: Any) -> None:
    with serving.client(config, jobs=open_jobs(config)) as client:
        trouble = lambda: client.get("/jobs").json()["trouble"]  # noqa: E731
        cluster.kill()
        assert until(trouble).startswith(f"Ray at {cluster.address} does not answer")
        cluster.start()
        until(lambda: trouble() is None)


# --- Without a cluster


def test_a_node_that_does_not_share_the_folder_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hildanext.jobs.child", str(tmp_path / "none"), "1", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"{tmp_path}/none does not exist on this machine; paths.runs must be on storage shared with the server\n"
    )


def test_the_address_is_checked() -> None:
    for jobs, line in (
        ({"backend": "ray"}, "'jobs.ray_address': required by backend 'ray'"),
        ({"backend": "ray", "ray_address": "127.0.0.1:8265"}, "'jobs.ray_address': must be a URL"),
        ({"ray_address": "ray://127.0.0.1:10001"}, "'jobs.ray_address': must be a URL"),
        ({"backend": "slurm"}, "jobs.backend"),
        ({"ray_num_gpus": -1.0}, "jobs.ray_num_gpus"),
    ):
        with pytest.raises(ConfigError, match=line):
            parse_config({"jobs": jobs})


def test_what_is_missing_or_in_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({"jobs": {"backend": "ray", "ray_address": "http://127.0.0.1:1"}})
    find_spec: Callable[[str], object] = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(UsageError, match=r"pip install 'hildanext\[ray\]'"):
        command.open_backend(config, {})
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="unset RAY_ADDRESS"):
        command.open_backend(config, {"RAY_ADDRESS": "auto"})


def test_jobs_of_the_other_backend_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scripted(monkeypatch, "print('{}')")
    jobs = open_jobs(parse_config({}))
    job, mine = queued(jobs), queued(jobs)
    assert jobs.store.move(job, "running", backend_id=f"hildanext-{job.id}-1")

    def done() -> bool:
        with pytest.raises(BackendError, match="1 running jobs belong to another backend than 'local'"):
            jobs.tick()
        return jobs.store.get(mine.id).state == "done"

    until(done)
    assert jobs.store.get(job.id).state == "running"
    assert not (jobs.path(job.id) / "started-1.json").exists()
