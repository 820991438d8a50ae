"""The jobs' table, in SQLite and in a PostgreSQL server that is started here."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hildanext.config import Config, parse_config
from hildanext.jobs.store import STATES, ConflictError, MissingError, Store, StoreError
from hildanext.server.command import open_jobs
from support.jobs import queued, scripted
from support.waiting import until

BINARIES = [Path(folder) for folder in sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]


class Postgres:
    """A server in a folder of its own that listens on a socket in it only. It refuses to run as root: then as nobody."""

    def __init__(self, binaries: Path) -> None:
        self.binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: the socket lies in it
        self.user = "nobody" if os.geteuid() == 0 else None
        if self.user is not None:
            shutil.chown(self.folder, self.user)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://hilda@/postgres?host={self.folder}"

    def call(self, name: str, *arguments: str) -> None:
        command = [self.binaries / name, "-D", self.folder / "data", *arguments]
        done = subprocess.run(command, user=self.user, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"
        self.call("pg_ctl", "-w", "-l", f"{self.folder}/log.txt", "-o", options, "start")

    def stop(self) -> None:
        self.call("pg_ctl", "-w", "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'hildanext[postgres]'")
    found = shutil.which("initdb")
    binaries = [*BINARIES, *([Path(found).resolve().parent] if found else [])]
    if not binaries:
        pytest.skip("there is no PostgreSQL server on this machine")
    server = Postgres(binaries[0])
    try:
        server.call("initdb", "-U", "hilda", "-A", "trust", "--no-sync")
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    store = Store(server.url)
    for job in store.list():
        store.move(job, "done")
        store.delete(job.id)
    store.close()
    return server.url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def test_a_job_is_what_was_added(store: Store, url: str) -> None:
    request = {"config": {"train": {"lr": 2e-4}}, "options": {"run": "naïve \u0000 \U0001f600"}}
    job, is_new = store.add("a", "sft", request, "key")
    assert is_new
    assert (job.state, job.attempt, job.cancel_requested, job.request) == ("queued", 1, False, request)
    other = Store(url)  # committed: another connection sees it, whole
    assert other.get("a") == job
    other.close()
    assert store.add("b", "sft", request, "key") == (job, False)
    with pytest.raises(ConflictError, match="job a"):
        store.add("c", "sft", {}, "key")
    for missing in ("b", "", "x" * 500, "a\0"):
        with pytest.raises(MissingError):
            store.get(missing)


def test_order_states_and_counts(store: Store) -> None:
    names = [f"job-{number}" for number in range(5)]
    for name in names:
        store.add(name, "sft", {})
    assert [job.id for job in store.list()] == names
    assert [job.id for job in store.list(limit=2, newest_first=True)] == names[:2:-1]
    assert store.move(store.get(names[1]), "running", started=12.5, backend_id="there")
    assert store.move(store.get(names[3]), "failed", note="why, \u20ac and \U0001f600", exit_code=-9, ended=1.5e9)
    assert [job.id for job in store.list(("queued",))] == [names[0], names[2], names[4]]
    failed, running = store.list(("failed",))[0], store.get(names[1])
    assert (failed.note, failed.exit_code, failed.ended) == ("why, \u20ac and \U0001f600", -9, 1.5e9)
    assert (running.started, running.backend_id) == (12.5, "there")
    assert store.counts() == dict.fromkeys(STATES, 0) | {"queued": 3, "running": 1, "failed": 1}
    with pytest.raises(ConflictError, match="running"):
        store.delete(names[1])
    store.delete(names[3])
    with pytest.raises(MissingError):
        store.get(names[3])


def test_who_looks_at_an_old_state_changes_nothing(store: Store) -> None:
    old, _ = store.add("a", "sft", {})
    assert store.move(old, "running")
    assert not store.move(old, "cancelled")
    running = store.get("a")
    assert store.move(running, "interrupted")
    assert store.move(store.get("a"), "queued", attempt=2)
    assert store.move(store.get("a"), "running")
    assert not store.move(running, "done")  # the first attempt's end, too late
    assert store.get("a").state == "running"


def test_of_many_who_claim_one_has_it(url: str) -> None:
    """Eight connections at once, on ten jobs, and on one idempotency key."""
    stores = [Store(url) for _ in range(8)]
    jobs = [stores[0].add(f"job-{number}", "sft", {})[0] for number in range(10)]
    claims: list[str] = []
    added: list[tuple[str, bool]] = []
    gate = threading.Barrier(len(stores))

    def work(number: int) -> None:
        gate.wait()
        job, is_new = stores[number].add(f"by-{number}", "sft", {}, "key")
        added.append((job.id, is_new))
        claims.extend(job.id for job in jobs if stores[number].move(job, "running"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == [job.id for job in jobs]
    assert len(added) == len(stores)
    assert len({name for name, _ in added}) == 1
    assert sum(is_new for _, is_new in added) == 1
    for store in stores:
        store.close()


def test_one_url_changes_the_store(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop on either database: queued, claimed, run, done."""
    monkeypatch.chdir(tmp_path)
    scripted(monkeypatch, "print('{}')")
    config: Config = parse_config({"jobs": {"database": url}})
    jobs = open_jobs(config)
    job = queued(jobs)
    until(lambda: jobs.tick() or jobs.store.get(job.id).state == "done")
    assert jobs.counts["done"] == 1
    jobs.store.close()


def test_a_server_that_was_away(postgres: Postgres) -> None:
    """What was committed survives the death of PostgreSQL; what is asked meanwhile is an error, not a loss."""
    store = Store(postgres.url)
    store.add("kept", "sft", {})
    postgres.stop()
    with pytest.raises(StoreError, match="job database"):
        store.get("kept")
    with pytest.raises(StoreError, match="job database"):
        Store(postgres.url)
    postgres.start()
    assert store.get("kept").state == "queued"
    store.close()
