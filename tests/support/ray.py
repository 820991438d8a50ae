"""As much of a Ray cluster as the jobs' backend asks for: job submission with two CPUs, on this machine, without Ray's processes."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any, NamedTuple

from ray.job_submission import JobStatus


class Details(NamedTuple):
    """What is read of Ray's JobDetails."""

    submission_id: str
    status: JobStatus
    message: str
    driver_exit_code: int | None


class Submitted:
    """A job that waits for a CPU, runs, or has ended."""

    def __init__(self, entrypoint: str, cpus: float, env: dict[str, str]) -> None:
        self.entrypoint, self.cpus, self.env = entrypoint, cpus, env
        self.status = JobStatus.PENDING
        self.message = "Job has not started yet."
        self.code: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.told = False  # to stop

    def run(self) -> None:
        self.process = subprocess.Popen(
            ["sh", "-c", self.entrypoint],
            env=os.environ | self.env,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.status = JobStatus.RUNNING

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def look(self) -> None:
        """Note its end. A job prints less than a pipe holds: its command's output goes into files."""
        if self.process is None or self.status is not JobStatus.RUNNING or self.process.poll() is None:
            return
        output, _ = self.process.communicate()
        self.code = self.process.returncode
        self.status = JobStatus.FAILED if self.code else JobStatus.SUCCEEDED
        self.message = f"Running entrypoint {self.entrypoint}\n{output.decode()}"


class StandIn:
    """The cluster, and the client that a backend has of it."""

    address = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.jobs: dict[str, Submitted] | None = None  # None: it does not answer

    def start(self) -> None:
        """It knows nothing of what ran before."""
        self.jobs = {}

    def kill(self) -> None:
        """As when the head node loses its power."""
        for job in (self.jobs or {}).values():
            job.signal(signal.SIGKILL)
            if job.process is not None and job.status is JobStatus.RUNNING:
                job.process.communicate()
        self.jobs = None

    def _known(self) -> dict[str, Submitted]:
        if self.jobs is None:
            raise ConnectionError("no cluster")
        for job in self.jobs.values():
            job.look()
        free = 2.0 - sum(job.cpus for job in self.jobs.values() if job.status is JobStatus.RUNNING)
        for job in self.jobs.values():
            if job.status is JobStatus.PENDING and job.cpus <= free:
                job.run()
                free -= job.cpus
        return self.jobs

    # What `hildanext.jobs.ray.Client` has

    def get_version(self) -> str:
        self._known()
        return "stand-in"

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        entrypoint_num_cpus: float,
        entrypoint_num_gpus: float,
        runtime_env: dict[str, Any],
    ) -> str:
        known = self._known()
        if submission_id in known:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        known[submission_id] = Submitted(entrypoint, entrypoint_num_cpus, runtime_env["env_vars"])
        self._known()
        return submission_id

    def get_job_info(self, submission_id: str) -> Details:
        for details in self.list_jobs():
            if details.submission_id == submission_id:
                return details
        raise RuntimeError(f"Job {submission_id} does not exist")

    def list_jobs(self) -> list[Details]:
        return [Details(name, job.status, job.message, job.code) for name, job in self._known().items()]

    def stop_job(self, submission_id: str) -> bool:
        job = self._known()[submission_id]
        if job.status is JobStatus.PENDING:
            job.status = JobStatus.STOPPED
        if not job.told:  # Ray's supervisor of a job sends SIGTERM once, however often it is asked
            job.told = True
            job.signal(signal.SIGTERM)
        return True
