"""The HTTP server and its jobs."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from hildanext.config.section import Section


class ServerConfig(Section):
    """Address, access, limits and shutdown of the HTTP server."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Any address other than loopback requires API keys.",
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on.")
    api_key_file: str | None = Field(
        None,
        description="File with one API key per line; requests must then send 'Authorization: Bearer KEY'. null reads "
        "keys from the environment variable HILDANEXT_API_KEYS only.",
    )
    max_prompt_chars: int = Field(
        100_000, ge=1, description="Maximum length of a prompt in characters. Longer prompts are refused."
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum length of an answer in tokens. A request that asks for more is refused; one of OpenAI's API "
        "that gives no length gets this, or what is left of the context. null: the context only.",
    )
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]] = Field(
        default_factory=list,
        description="Origins of web pages that may call the server from a browser, for example 'http://localhost:3000'. "
        "'*' allows every page and requires API keys. By default only the server's own page may.",
    )
    queue: int = Field(
        64,
        ge=0,
        description="Number of requests that may wait for a slot. Further requests are refused with status 429.",
    )
    deadline_s: float = Field(
        600.0, gt=0.0, description="Maximum time for a request in seconds. A request may ask for a shorter deadline."
    )
    drain_s: int = Field(
        30,
        ge=0,
        description="Seconds that running requests may take to finish after SIGTERM. Those still running after it are "
        "aborted.",
    )
    base: bool = Field(
        True,
        description="Offer the checkpoint's AR base at /generate/base; it is loaded on the first request. Set false "
        "to save that memory.",
    )
    log_prompts: bool = Field(
        False, description="Write prompts and completions to the log. They may contain personal data."
    )


class JobsConfig(Section):
    """Where jobs run and where they are recorded."""

    database: str | None = Field(
        None,
        description="SQLAlchemy URL of the job table, for example postgresql+psycopg://... null uses SQLite in "
        "paths.runs/jobs.sqlite.",
    )
    backend: Literal["local", "ray"] = Field(
        "local",
        description="'local' runs jobs as processes on this machine, 'ray' on the Ray cluster at ray_address. With "
        "'ray', all nodes must see the server's working folder and paths.runs under the same paths.",
    )
    at_once: int = Field(
        1,
        ge=1,
        description="Maximum number of jobs at the same time. With 'ray' it limits the jobs submitted to the cluster.",
    )
    cancel_s: float = Field(
        30.0, ge=0.0, description="Seconds a cancelled job may take to stop by itself before it is killed."
    )
    share_gpu: bool = Field(
        False,
        description="Let local jobs use the GPU while it holds the served model. Enable it only if both fit into "
        "memory; no effect with 'ray'.",
    )
    ray_address: str | None = Field(
        None, description="URL of the Ray dashboard, for example http://127.0.0.1:8265. Required by backend 'ray'."
    )
    ray_num_cpus: float = Field(
        1.0, ge=0.0, description="Number of CPUs that Ray reserves for a job, and of threads that the job uses."
    )
    ray_num_gpus: float = Field(
        0.0,
        ge=0.0,
        description="Number of GPUs that Ray reserves for a job that loads a model. 0 hides all GPUs from it.",
    )
    ray_python: str | None = Field(
        None,
        description="Python interpreter on the cluster's nodes, with hildanext installed. null uses the path of the "
        "server's interpreter.",
    )

    @model_validator(mode="after")
    def _ray_needs_its_address(self) -> JobsConfig:
        if self.ray_address is not None:
            parts = urlsplit(self.ray_address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"'ray_address': must be a URL such as http://127.0.0.1:8265, got {self.ray_address!r}"
                )
        elif self.backend == "ray":
            raise ValueError("'ray_address': required by backend 'ray'; set it, for example to http://127.0.0.1:8265")
        return self
