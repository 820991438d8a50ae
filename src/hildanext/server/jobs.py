"""/jobs: start, watch, cancel, resume and delete jobs. A job runs one command of the command line."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Field

from hildanext.config import Config, schema
from hildanext.errors import HildaError
from hildanext.files import write_json
from hildanext.jobs.kinds import (
    KINDS,
    SECTIONS,
    TAKES,
    TRAINING,
    USES,
    Kind,
    Options,
    check_options,
    job_config,
)
from hildanext.jobs.reach import reach_of
from hildanext.jobs.store import ENDED, STATES, ConflictError, Job, State, new_id
from hildanext.jobs.watcher import Jobs
from hildanext.server.answers import event_stream, problems, streams
from hildanext.server.bodies import Body
from hildanext.server.sharing import check_inside, check_run, gpu_trouble, job_trouble
from hildanext.server.tail import follow as follow_file
from hildanext.server.tail import last_lines, rows_of
from hildanext.server.worker import Worker

MOST_TAIL = 16_000_000
Tail = Annotated[int, Query(ge=1, le=MOST_TAIL)]
USUAL = problems(401, 403, 404, 503)


class JobBody(Body):
    kind: Kind
    config: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of the server's configuration, by section."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the command: run, k, split.")


def job_routes(config: Config, worker: Worker, jobs: Jobs) -> APIRouter:
    """Build the /jobs routes. The workspace is the folder in which the server was started."""
    router = APIRouter(prefix="/jobs")
    _add_start(router, config, worker, jobs)
    _add_schema(router, config)
    _add_views(router, jobs)
    _add_controls(router, config, worker, jobs)
    jobs.why_not = partial(job_trouble, config, worker, jobs)
    return router


def _add_start(router: APIRouter, config: Config, worker: Worker, jobs: Jobs) -> None:
    workspace = Path.cwd()

    replayed: dict[int | str, dict[str, Any]] = {
        200: {"description": "The job that an earlier request with this key created."}
    }

    @router.post("", status_code=201, responses=replayed | problems(400, 401, 403, 409, 411, 413, 422, 503))
    def start(
        body: JobBody, idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None
    ) -> Response:
        """Queue a job. Repeating a request with the same Idempotency-Key returns the same job."""
        options = check_options(body.kind, body.options)
        merged = job_config(config, body.config, workspace)
        # While the model loads its device is unknown: the job is accepted and waits.
        if worker.state != "loading" and (why := gpu_trouble(config, worker, body.kind, merged.model.device)):
            raise ConflictError(why)
        request, job_id = {"config": body.config, "options": options.model_dump()}, new_id()
        # The job's process may start as soon as the row exists, so its files are written first.
        try:
            write_json(jobs.path(job_id) / "config.json", merged.model_dump(mode="json"))
            write_json(jobs.path(job_id) / "reach.json", reach_of(config, workspace)._asdict())
            with jobs.run_lock:
                check_run(jobs, body.kind, options.run or job_id, but_key=idempotency_key)
                job, is_new = jobs.store.add(job_id, body.kind, request, idempotency_key)
        except (HildaError, OSError):
            shutil.rmtree(jobs.path(job_id), ignore_errors=True)
            raise
        if not is_new:
            shutil.rmtree(jobs.path(job_id))
        jobs.wake()
        return JSONResponse(_shown(jobs, job), 201 if is_new else 200, {"Location": f"/jobs/{job.id}"})


def _add_schema(router: APIRouter, config: Config) -> None:
    whole, values = schema(), config.model_dump(mode="json", include=set(SECTIONS))
    # Sections that a job may not set are not shown.
    sections = {name: whole["properties"][name] for name in SECTIONS}

    @router.get("/schema", responses=problems(401, 403))
    async def form() -> dict[str, Any]:
        """Data for a form that sends POST /jobs: kinds, options, the sections' JSON Schema and the server's values."""
        return {
            "kinds": {kind: {"options": sorted(TAKES.get(kind, ())), "sections": USES[kind]} for kind in KINDS},
            "options": Options.model_json_schema()["properties"],
            "schema": {"properties": sections, "$defs": whole["$defs"]},
            "values": values,
        }


def _add_views(router: APIRouter, jobs: Jobs) -> None:
    store = jobs.store

    @router.get("", responses=problems(401, 403, 503))
    def all_jobs(state: State | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """The newest jobs, newest first. `trouble`: why jobs cannot be started or watched now, if so."""
        found = store.list((state,) if state else STATES, limit, newest_first=True)
        return {"jobs": [_shown(jobs, job) for job in found], "trouble": jobs.trouble}

    @router.get("/{job_id}", responses=USUAL)
    def show_job(job_id: str) -> dict[str, Any]:
        """One job, with the result that its command printed."""
        job = store.get(job_id)
        return _shown(jobs, job) | {"result": _result(jobs, job)}

    @router.get("/{job_id}/logs", response_class=Response, responses={200: streams("text/plain"), **USUAL})
    def logs(job_id: str, follow: bool = False, tail: Tail = 1_000_000) -> Response:
        """The last `tail` bytes of the command's stderr; X-Skipped-Bytes counts the bytes before them.

        `follow` streams the whole log until the job ends, one server-sent event per line.
        """
        path = jobs.path(store.get(job_id).id) / "log.txt"
        if follow:
            return event_stream(follow_file(jobs, job_id, path))
        text, skipped = last_lines(path, tail)
        return PlainTextResponse(text.decode(errors="replace"), headers={"X-Skipped-Bytes": str(skipped)})

    @router.get("/{job_id}/metrics", responses={200: streams("application/json"), **USUAL, **problems(400)})
    def metrics(job_id: str, follow: bool = False, tail: Tail = MOST_TAIL) -> Response:
        """The rows in the last `tail` bytes of the run's metrics.jsonl, after `skipped_bytes`. NaN becomes null.

        `follow` streams all rows until the job ends, with a 'reset' event when the file was rewound.
        """
        job = store.get(job_id)
        path = jobs.run(job) / "metrics.jsonl"
        check_inside(jobs, path)
        if follow:
            return event_stream(follow_file(jobs, job_id, path))
        text, skipped = last_lines(path, tail)
        return JSONResponse({"rows": rows_of(text), "skipped_bytes": skipped})


def _add_controls(router: APIRouter, config: Config, worker: Worker, jobs: Jobs) -> None:
    store = jobs.store

    @router.post("/{job_id}/cancel", responses={**USUAL, **problems(409, 411, 413)})
    def cancel(job_id: str) -> dict[str, Any]:
        """Cancel a job. A queued job ends at once; a running job is asked to stop and killed after jobs.cancel_s."""
        job = store.get(job_id)
        if job.state == "queued" and not store.move(job, "cancelled", ended=time.time()):
            job = store.get(job_id)
        if job.state == "running":
            store.move(job, "running", cancel_requested=True)
        elif job.state in ENDED and job.state != "cancelled":
            raise ConflictError(f"job {job_id} is {job.state}; only a queued or running job can be cancelled")
        jobs.wake()
        return _shown(jobs, store.get(job_id))

    @router.post("/{job_id}/resume", responses={**USUAL, **problems(409, 411, 413)})
    def resume(job_id: str) -> dict[str, Any]:
        """Queue an interrupted, failed or cancelled job again. Training continues from its last checkpoint."""
        job = store.get(job_id)
        if job.state not in ("interrupted", "failed", "cancelled"):
            raise ConflictError(
                f"job {job_id} is {job.state}; only an interrupted, failed or cancelled job can be resumed"
            )
        if worker.state != "loading" and (why := job_trouble(config, worker, jobs, job)):
            raise ConflictError(why)
        again = {"attempt": job.attempt + 1, "cancel_requested": False, "exit_code": None, "note": None}
        with jobs.run_lock:
            check_run(jobs, job.kind, jobs.run(job).name, but_id=job_id)
            if not store.move(job, "queued", **again, started=None, ended=None):
                raise ConflictError(f"job {job_id} was changed by another request")
        jobs.wake()
        return _shown(jobs, store.get(job_id))

    @router.delete("/{job_id}", status_code=204, responses={**USUAL, **problems(409)})
    def delete(job_id: str) -> Response:
        """Delete an ended job and its log. The run's folder and its checkpoints are kept."""
        store.delete(job_id)
        shutil.rmtree(jobs.path(job_id), ignore_errors=True)
        return Response(status_code=204)


def _shown(jobs: Jobs, job: Job) -> dict[str, Any]:
    waits = {"waits_because": jobs.why_not(job)} if job.state == "queued" else {}
    return job.as_dict() | waits | ({"run": str(jobs.run(job))} if job.kind in (*TRAINING, "merge-topk") else {})


def _result(jobs: Jobs, job: Job) -> Any:
    path = jobs.path(job.id) / f"stdout-{job.attempt}.json"
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= MOST_TAIL else None
    except (OSError, ValueError):
        return None
