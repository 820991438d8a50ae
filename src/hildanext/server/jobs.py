"""/jobs: start, watch, cancel and resume the commands of the CLI."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Field

from hildanext.config import Config, schema
from hildanext.errors import HildaError
from hildanext.files import write_json
from hildanext.jobs.kinds import (
    GPU_KINDS,
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
from hildanext.jobs.store import ENDED, STATES, ConflictError, Job, State, new_id
from hildanext.jobs.watcher import Jobs
from hildanext.server.answers import event_stream, problems, sse, streams
from hildanext.server.bodies import Body
from hildanext.server.worker import Worker

FOLLOW_S = 0.25
USUAL = problems(401, 403, 404, 503)


class JobBody(Body):
    kind: Kind
    config: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of the server's configuration, section by section."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="What the command takes besides: run, k, split.")


def job_routes(config: Config, worker: Worker, jobs: Jobs) -> APIRouter:
    """The workspace is the folder that the server was started in."""
    router = APIRouter(prefix="/jobs")
    _add_start(router, config, worker, jobs)
    _add_schema(router, config)
    _add_views(router, jobs)
    _add_controls(router, jobs)
    return router


def _add_start(router: APIRouter, config: Config, worker: Worker, jobs: Jobs) -> None:
    workspace = Path.cwd()

    def check_gpu(kind: str, job: Config) -> None:
        served = (worker.engine.device if worker.engine is not None else None) or ""
        wants = kind in GPU_KINDS and job.model.device != "cpu"
        # Ray hands out the GPUs that it was started with.
        if config.jobs.backend == "local" and wants and served.startswith("cuda") and not config.jobs.share_gpu:
            raise ConflictError(
                "the served model is on the GPU; set jobs.share_gpu, or model.device 'cpu' for this job"
            )

    replayed: dict[int | str, dict[str, Any]] = {200: {"description": "The job that this key made before."}}

    @router.post("", status_code=201, responses=replayed | problems(400, 401, 403, 409, 411, 413, 422, 503))
    def start(
        body: JobBody, idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None
    ) -> Response:
        """Queue a job. With an Idempotency-Key the same request again gives the same job."""
        options = check_options(body.kind, body.options)
        merged = job_config(config, body.config, workspace)
        check_gpu(body.kind, merged)
        request, job_id = {"config": body.config, "options": options.model_dump()}, new_id()
        # All that the job's process reads is on the disk before the job is there.
        try:
            write_json(jobs.path(job_id) / "config.json", merged.model_dump(mode="json"))
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
    # What the jobs may not touch stays unsaid.
    sections = {name: whole["properties"][name] for name in SECTIONS}

    @router.get("/schema", responses=problems(401, 403))
    async def form() -> dict[str, Any]:
        """What a form needs to make a POST /jobs: kinds, options, the sections' JSON Schema and the server's values."""
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
        """The newest jobs, newest first. `trouble`: why none can be started or looked after just now."""
        found = store.list((state,) if state else STATES, limit, newest_first=True)
        return {"jobs": [_shown(jobs, job) for job in found], "trouble": jobs.trouble}

    @router.get("/{job_id}", responses=USUAL)
    def one(job_id: str) -> dict[str, Any]:
        """A job, and what its command printed if it is done."""
        job = store.get(job_id)
        return _shown(jobs, job) | {"result": _result(jobs, job)}

    @router.get("/{job_id}/logs", response_class=Response, responses={200: streams("text/plain"), **USUAL})
    def logs(job_id: str, follow: bool = False) -> Response:
        """What the command wrote to stderr; `follow` streams it (server-sent events, a line each) to the job's end."""
        path = jobs.path(store.get(job_id).id) / "log.txt"
        if follow:
            return event_stream(_follow(jobs, job_id, path))
        return PlainTextResponse(path.read_bytes().decode(errors="replace") if path.is_file() else "")

    @router.get("/{job_id}/metrics", responses={200: streams("application/json"), **USUAL})
    def metrics(job_id: str, follow: bool = False) -> Response:
        """The rows of the run's metrics.jsonl; `follow` streams them to the job's end, with 'reset' when it was rewound."""
        job = store.get(job_id)
        path = jobs.run(job) / "metrics.jsonl"
        if follow:
            return event_stream(_follow(jobs, job_id, path))
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return JSONResponse({"rows": [json.loads(line) for line in lines]})


def _add_controls(router: APIRouter, jobs: Jobs) -> None:
    store = jobs.store

    @router.post("/{job_id}/cancel", responses={**USUAL, **problems(409, 411, 413)})
    def cancel(job_id: str) -> dict[str, Any]:
        """A queued job ends at once; a running one is asked to stop, and killed if it does not in jobs.cancel_s."""
        job = store.get(job_id)
        if job.state == "queued" and not store.move(job, "cancelled"):
            job = store.get(job_id)
        if job.state == "running":
            store.move(job, "running", cancel_requested=True)
        elif job.state in ENDED and job.state != "cancelled":
            raise ConflictError(f"job {job_id} is {job.state}")
        jobs.wake()
        return _shown(jobs, store.get(job_id))

    @router.post("/{job_id}/resume", responses={**USUAL, **problems(409, 411, 413)})
    def resume(job_id: str) -> dict[str, Any]:
        """Queue an interrupted, failed or cancelled job once more; training goes on from its last checkpoint."""
        job = store.get(job_id)
        if job.state not in ("interrupted", "failed", "cancelled"):
            raise ConflictError(
                f"job {job_id} is {job.state}; only what was interrupted, failed or cancelled can go on"
            )
        again = {"attempt": job.attempt + 1, "cancel_requested": False, "exit_code": None, "note": None}
        if not store.move(job, "queued", **again, started=None, ended=None):
            raise ConflictError(f"job {job_id} was changed by another request")
        jobs.wake()
        return _shown(jobs, store.get(job_id))

    @router.delete("/{job_id}", status_code=204, responses={**USUAL, **problems(409)})
    def delete(job_id: str) -> Response:
        """Forget an ended job and its log. The run's folder with its checkpoints stays."""
        store.delete(job_id)
        shutil.rmtree(jobs.path(job_id), ignore_errors=True)
        return Response(status_code=204)


def _shown(jobs: Jobs, job: Job) -> dict[str, Any]:
    return job.as_dict() | ({"run": str(jobs.run(job))} if job.kind in (*TRAINING, "merge-topk") else {})


def _result(jobs: Jobs, job: Job) -> Any:
    try:
        return json.loads((jobs.path(job.id) / f"stdout-{job.attempt}.json").read_text())
    except (OSError, ValueError):
        return None


async def _follow(jobs: Jobs, job_id: str, path: Path) -> AsyncIterator[str]:
    """Whole lines of a growing file, to the end of the job. A file that was replaced is read again from its start."""
    offset, inode = 0, None
    while True:
        job = await asyncio.to_thread(jobs.store.get, job_id)
        if path.is_file():
            status = path.stat()
            if inode is not None and (status.st_ino != inode or status.st_size < offset):
                offset = 0
                yield sse({}, "reset")
            inode = status.st_ino
            with open(path, "rb") as file:
                file.seek(offset)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            offset += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                yield sse(json.loads(line) if path.suffix == ".jsonl" else line)
        if job.state in ENDED:
            yield sse({"state": job.state}, "end")
            return
        await asyncio.sleep(FOLLOW_S)
