"""The Ray backend: each attempt is a job of an existing Ray cluster, with a name that is known before it is submitted.

An attempt is the same `child` process as with the local backend, so its folder must be on storage that the nodes share.
Ray reports whether the attempt waits or runs; the files in the folder say how it ended.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobSubmissionClient

from hildanext.config import JobsConfig
from hildanext.jobs.backend import BackendError, Look
from hildanext.jobs.child import REFUSED, is_held
from hildanext.jobs.kinds import GPU_KINDS
from hildanext.jobs.store import Job

TIMEOUT_S = 10.0  # for an answer from Ray; otherwise a dead head node would block the watcher forever
FORGOTTEN = "the Ray cluster no longer knows the job (was it restarted?); resume the job"
SHARED = "the server's folder, paths.runs and Python must exist on the cluster's nodes under the same paths"


class Client(JobSubmissionClient):
    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, timeout=TIMEOUT_S, **kwargs)


class RayBackend:
    every_s = 1.0  # as often as Ray itself polls

    def __init__(self, config: JobsConfig, workspace: Path) -> None:
        """`workspace`: working folder of the commands. The cluster is not contacted yet."""
        self.config, self.workspace = config, workspace
        self.python = config.ray_python or sys.executable
        self._connected: Client | None = None

    def backend_id(self, job: Job) -> str:
        return f"hildanext-{job.id}-{job.attempt}"

    def trouble(self) -> str | None:
        try:
            with self._client() as client:
                client.get_version()
        except BackendError as error:
            return str(error)
        return None

    def start(self, job: Job, folder: Path, command: list[str]) -> None:
        wants_gpu = (
            job.kind in GPU_KINDS and json.loads((folder / "config.json").read_text())["model"]["device"] != "cpu"
        )
        entrypoint = f"cd {shlex.quote(str(self.workspace))} && exec {shlex.join(command)}"
        # By default Ray kills a job 3 seconds after asking it to stop, possibly in the middle of a checkpoint.
        env = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(self.config.cancel_s))}
        gpus = self.config.ray_num_gpus if wants_gpu else 0.0
        if gpus == 0.0:  # otherwise the job would see all GPUs of its node, including those of other jobs
            env["CUDA_VISIBLE_DEVICES"] = ""
        with self._client() as client:
            try:
                client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=self.backend_id(job),
                    entrypoint_num_cpus=self.config.ray_num_cpus,
                    entrypoint_num_gpus=gpus,
                    runtime_env={"env_vars": env},
                )
            except RuntimeError:  # refused, possibly because an earlier submission arrived and its answer was lost
                if self._details(client, self.backend_id(job)) is None:
                    raise

    def look(self, job: Job, folder: Path) -> Look:
        if (folder / f"exit-{job.attempt}.json").is_file():
            return Look("gone")
        with self._client() as client:
            details = self._details(client, self.backend_id(job))
        has_begun = (folder / f"started-{job.attempt}.json").is_file()
        if details is not None and not details.status.is_terminal():
            return Look("alive" if has_begun else "waiting")
        if has_begun and is_held(folder):  # Ray lost the job and is about to kill it
            return Look("alive")
        if details is None:
            return Look("gone", note=FORGOTTEN) if has_begun else Look("unknown")
        code = details.driver_exit_code
        if code is not None and (code < 0 or code == REFUSED):  # killed, or started before the cluster lost it
            code = None
        return Look("gone", code) if has_begun else Look("gone", code, _why(details, folder))

    def stop(self, job: Job, folder: Path) -> None:
        """Stop the attempt: Ray sends SIGTERM, then SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""
        with self._client() as client:
            client.stop_job(self.backend_id(job))

    @contextmanager
    def _client(self) -> Iterator[Client]:
        """Yield the client of the cluster. Its errors are raised as BackendError."""
        try:
            if self._connected is None:
                self._connected = Client(self.config.ray_address)
            yield self._connected
        except OSError as error:  # includes errors of requests, whose text varies between attempts
            trouble = f"does not answer ({type(error).__name__})"
        except (RuntimeError, RayError) as error:
            lines = [line for line in str(error).splitlines() if any(map(str.isalpha, line))]
            trouble = f"failed: {lines[-1][:300] if lines else type(error).__name__}"
        else:
            return
        raise BackendError(f"Ray at {self.config.ray_address} {trouble}")

    def _details(self, client: Client, submission_id: str) -> JobDetails | None:
        """Return the cluster's record of a job, or None. Ray raises one error for unknown jobs and failed queries."""
        try:
            return client.get_job_info(submission_id)
        except RuntimeError:
            if submission_id in {details.submission_id for details in client.list_jobs()}:
                raise
            return None


def _why(details: JobDetails, folder: Path) -> str:
    """Explain an attempt that ended before it started: append Ray's message to the log, return its last useful line."""
    with open(folder / "log.txt", "a") as log:
        log.write(f"{details.message}\n")
    lines = [line.strip() for line in (details.message or "").splitlines()]
    own = [
        line for line in lines if line and not line.startswith("Running entrypoint ") and "INFO job_manager" not in line
    ]
    return f"Ray could not run the job: {own[-1][:300] if own else details.status}; {SHARED}"
