"""The server and its jobs."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from hildanext.config.section import Section


class ServerConfig(Section):
    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to bind. Anything but loopback requires API keys."
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port.")
    api_key_file: str | None = Field(
        None,
        description="File with one API key a line; requests then need 'Authorization: Bearer KEY'. HILDANEXT_API_KEYS does too.",
    )
    max_prompt_chars: int = Field(100_000, ge=1, description="Longer prompts are refused.")
    queue: int = Field(64, ge=0, description="Requests that may wait for a slot; more get 429.")
    deadline_s: float = Field(600.0, gt=0.0, description="Seconds a request may take; it may ask for less.")
    drain_s: int = Field(30, ge=0, description="Seconds that running requests have to finish after SIGTERM.")
    base: bool = Field(
        True, description="Let /generate/base load the checkpoint's AR base, at the first request for it."
    )
    log_prompts: bool = Field(False, description="Write prompts and answers into the log.")


class JobsConfig(Section):
    database: str | None = Field(
        None,
        description="SQLAlchemy URL, for example postgresql+psycopg://...; null: SQLite in paths.runs/jobs.sqlite.",
    )
    backend: Literal["local", "ray"] = Field(
        "local",
        description="local: processes of this machine; ray: jobs of the Ray cluster at ray_address. With ray the folder the "
        "server was started in and paths.runs must be on storage that the cluster's nodes share, under the same paths.",
    )
    at_once: int = Field(1, ge=1, description="Jobs that run at the same time; more wait. With ray: that it is given.")
    cancel_s: float = Field(30.0, ge=0.0, description="Seconds between asking a cancelled job to stop and killing it.")
    share_gpu: bool = Field(
        False,
        description="Let local jobs use the GPU while the served model is on it. Ray gives away what it was started with.",
    )
    ray_address: str | None = Field(
        None, description="URL of the Ray cluster's dashboard, such as http://127.0.0.1:8265."
    )
    ray_num_cpus: float = Field(
        1.0, ge=0.0, description="CPUs that Ray reserves for a job, and threads it computes with."
    )
    ray_num_gpus: float = Field(
        0.0, ge=0.0, description="GPUs that Ray reserves for a job with a model; 0: it sees none."
    )
    ray_python: str | None = Field(
        None, description="Python with hildanext on the cluster's nodes; null: the path of the server's own."
    )

    @model_validator(mode="after")
    def _ray_needs_its_address(self) -> JobsConfig:
        if self.ray_address is not None:
            parts = urlsplit(self.ray_address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"'ray_address' must be a URL such as http://127.0.0.1:8265, got {self.ray_address!r}")
        elif self.backend == "ray":
            raise ValueError("backend 'ray' needs 'ray_address', for example http://127.0.0.1:8265")
        return self
