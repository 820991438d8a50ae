"""Conflicts of a job: a GPU that the served model uses, and a run folder that it must not write."""

from __future__ import annotations

import json
from pathlib import Path

from hildanext.config import Config
from hildanext.errors import UsageError
from hildanext.jobs.kinds import GPU_KINDS, TRAINING
from hildanext.jobs.store import ConflictError, Job
from hildanext.jobs.watcher import Jobs
from hildanext.server.worker import Worker

TABLE = "jobs.sqlite"  # with its journals


def check_inside(jobs: Jobs, path: Path) -> None:
    """Raise UsageError if a path in paths.runs leads out of it."""
    if not path.resolve().is_relative_to(jobs.runs.resolve()):
        raise UsageError(f"{path.relative_to(jobs.runs)} leads out of paths.runs")


def gpu_trouble(config: Config, worker: Worker, kind: str, device: str) -> str | None:
    """Return why a job of this kind and `model.device` must not run now, or None. Ray assigns its own GPUs."""
    if config.jobs.backend != "local" or config.jobs.share_gpu or kind not in GPU_KINDS or device == "cpu":
        return None
    if worker.state == "loading":
        return "the served model is loading and may use the GPU"
    if worker.engine is not None and (worker.engine.device or "").startswith("cuda"):
        return "the served model uses the GPU; set jobs.share_gpu, or model.device 'cpu' for this job"
    return None


def job_trouble(config: Config, worker: Worker, jobs: Jobs, job: Job) -> str | None:
    """Return why an existing job must not start now, or None."""
    if job.kind not in GPU_KINDS:
        return None
    try:
        device = json.loads((jobs.path(job.id) / "config.json").read_text(encoding="utf-8"))["model"]["device"]
    except FileNotFoundError:  # the command will report it
        return None
    return gpu_trouble(config, worker, job.kind, device)


def check_run(jobs: Jobs, kind: str, run: str, *, but_id: str | None = None, but_key: str | None = None) -> None:
    """Raise ConflictError if an unfinished training job already writes the run's folder.

    Raises UsageError for the name of a file, for a name of the job table's files, and for a link that leaves paths.runs.
    """
    folder = jobs.runs / run
    if run.startswith(TABLE) or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"'options.run': {run} is a file in paths.runs; choose another name")
    check_inside(jobs, folder)
    if kind not in TRAINING:
        return
    for job in jobs.store.list(("queued", "running")):
        is_same = job.id == but_id or (but_key is not None and job.idempotency_key == but_key)
        if job.kind in TRAINING and jobs.run(job).name == run and not is_same:
            raise ConflictError(f"run '{run}' belongs to job {job.id}, which is {job.state}; choose another run name")
