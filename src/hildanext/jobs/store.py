"""The table of jobs. A change is committed before it is reported; a state change names the state it expects."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError, IntegrityError

from hildanext.errors import HildaError, UsageError

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
STATES: tuple[State, ...] = ("queued", "running", "done", "failed", "cancelled", "interrupted")
ENDED: tuple[State, ...] = ("done", "failed", "cancelled", "interrupted")
BUSY_S = 5.0  # seconds that SQLite waits for another process's lock

TABLE = sql.Table(
    "jobs",
    sql.MetaData(),
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("kind", sql.String(32), nullable=False),
    sql.Column("request", sql.Text, nullable=False),  # the request's configuration and options, as JSON
    sql.Column("idempotency_key", sql.String(200), unique=True),
    sql.Column("state", sql.String(16), nullable=False, index=True),
    sql.Column("attempt", sql.Integer, nullable=False),  # starts at 1; each resume adds 1
    sql.Column("cancel_requested", sql.Boolean, nullable=False),
    sql.Column("backend_id", sql.String(200)),  # the backend's name for the running attempt
    sql.Column("exit_code", sql.Integer),
    sql.Column("note", sql.Text),  # why the job ended this way
    sql.Column("created", sql.Float, nullable=False, index=True),  # seconds since 1970
    sql.Column("started", sql.Float),
    sql.Column("ended", sql.Float),
)


class StoreError(HildaError):
    """The database cannot be reached or is locked. Nothing was changed."""


class ConflictError(HildaError):
    """The job's state does not allow the change, or an idempotency key was used for another request."""


class MissingError(HildaError):
    """The job does not exist."""


@dataclass(frozen=True)
class Job:
    id: str
    kind: str
    request: dict[str, Any]
    idempotency_key: str | None
    state: State
    attempt: int
    cancel_requested: bool
    backend_id: str | None
    exit_code: int | None
    note: str | None
    created: float
    started: float | None
    ended: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _job(row: sql.RowMapping) -> Job:
    return Job(**{**row, "request": json.loads(row["request"])})


def new_id() -> str:
    """Return a new job id: the UTC time and 32 random bits."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


class Store:
    """The jobs in a database, given by an SQLAlchemy URL."""

    def __init__(self, url: str) -> None:
        """Raises UsageError for an invalid URL or a missing driver, StoreError if the database cannot be opened."""
        try:
            is_sqlite = sql.engine.make_url(url).get_backend_name() == "sqlite"
            self.engine = sql.create_engine(
                url, connect_args={"timeout": BUSY_S} if is_sqlite else {}, pool_pre_ping=True
            )
        except ModuleNotFoundError as error:
            raise UsageError(f"'jobs.database': {error}; for PostgreSQL: pip install 'hildanext[postgres]'") from None
        except (sql.exc.ArgumentError, sql.exc.NoSuchModuleError) as error:
            raise UsageError(f"'jobs.database': {error}") from None
        if is_sqlite:
            sql.event.listen(self.engine, "connect", _durable)
        with self._begin() as connection:
            TABLE.metadata.create_all(connection)

    @contextmanager
    def _begin(self) -> Iterator[sql.Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise StoreError(f"job database: {' '.join(str(error.orig).split())}") from None

    def add(
        self, job_id: str, kind: str, request: dict[str, Any], idempotency_key: str | None = None
    ) -> tuple[Job, bool]:
        """Add a queued job; returns (job, True). If the idempotency key exists, returns (its job, False).

        Raises ConflictError if the key was used for another request, StoreError.
        """
        job = Job(
            id=job_id,
            kind=kind,
            request=request,
            idempotency_key=idempotency_key,
            state="queued",
            attempt=1,
            cancel_requested=False,
            backend_id=None,
            exit_code=None,
            note=None,
            created=time.time(),
            started=None,
            ended=None,
        )
        try:
            with self._begin() as connection:
                connection.execute(TABLE.insert().values(**{**asdict(job), "request": json.dumps(request)}))
            return job, True
        except IntegrityError:
            old = self._find(TABLE.c.idempotency_key == idempotency_key)
        if (old.kind, old.request) != (kind, request):
            raise ConflictError(f"this Idempotency-Key was already used for another request, job {old.id}")
        return old, False

    def get(self, job_id: str) -> Job:
        if "\0" in job_id:  # PostgreSQL refuses NUL in text
            raise MissingError("no such job")
        return self._find(TABLE.c.id == job_id)

    def _find(self, where: sql.ColumnElement[bool]) -> Job:
        with self._begin() as connection:
            row = connection.execute(TABLE.select().where(where)).mappings().first()
        if row is None:
            raise MissingError("no such job")
        return _job(row)

    def list(
        self, states: tuple[State, ...] = STATES, limit: int | None = None, newest_first: bool = False
    ) -> list[Job]:
        order = TABLE.c.created.desc() if newest_first else TABLE.c.created.asc()
        query = TABLE.select().where(TABLE.c.state.in_(states)).order_by(order, TABLE.c.id).limit(limit)
        with self._begin() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[State, int]:
        """Return the number of jobs in each state."""
        query = sql.select(TABLE.c.state, sql.func.count()).group_by(TABLE.c.state)
        with self._begin() as connection:
            found: dict[str, int] = {row[0]: row[1] for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in STATES}

    def move(self, job: Job, to: State, **values: Any) -> bool:
        """Change the state if the stored job still has the state and attempt of `job`. Returns False otherwise."""
        changed = TABLE.update().where(TABLE.c.id == job.id, TABLE.c.state == job.state, TABLE.c.attempt == job.attempt)
        with self._begin() as connection:
            return connection.execute(changed.values(state=to, **values)).rowcount == 1

    def delete(self, job_id: str) -> None:
        """Delete an ended job. Raises MissingError, or ConflictError if the job has not ended."""
        job = self.get(job_id)
        with self._begin() as connection:
            gone = connection.execute(TABLE.delete().where(TABLE.c.id == job_id, TABLE.c.state.in_(ENDED))).rowcount
        if not gone:
            raise ConflictError(f"job {job_id} is {job.state}; cancel it first")

    def close(self) -> None:
        self.engine.dispose()


def _durable(connection: Any, record: object) -> None:
    """Configure a new SQLite connection: readers do not wait for writers, and a commit is on disk when it returns."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
