"""Conflicts of a job: a GPU that the served model uses, and a run folder that another job writes."""

from __future__ import annotations

import json

from hildanext.config import Config
from hildanext.jobs.kinds import GPU_KINDS, TRAINING
from hildanext.jobs.store import ConflictError, Job
from hildanext.jobs.watcher import Jobs
from hildanext.server.worker import Worker


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
    """Raise ConflictError if an unfinished training job already writes the run's folder."""
    if kind not in TRAINING:
        return
    for job in jobs.store.list(("queued", "running")):
        is_same = job.id == but_id or (but_key is not None and job.idempotency_key == but_key)
        if job.kind in TRAINING and jobs.run(job).name == run and not is_same:
            raise ConflictError(f"run '{run}' belongs to job {job.id}, which is {job.state}; choose another run name")
