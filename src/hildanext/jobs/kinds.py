"""What a job may be asked to do: a command, options of its own, and overrides of some sections of the configuration.

Nothing in a request can name a file outside the workspace, and no key that could run foreign code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hildanext.config import Config, parse_config
from hildanext.errors import ConfigError, UsageError

Kind = Literal["prepare-data", "tokenize", "convert-wsd", "sft", "merge-topk", "benchmark", "calibrate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRAINING: tuple[Kind, ...] = ("convert-wsd", "sft")
GPU_KINDS: tuple[Kind, ...] = (*TRAINING, "merge-topk", "benchmark", "calibrate")
SECTIONS = ("model", "data", "noise", "loss", "wsd", "train", "lora", "sft", "decode", "engine", "calibrate")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Options(BaseModel):
    """What the commands take besides the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: str | None = Field(
        None,
        description="Run folder under paths.runs. Training: a new one, named after the job if left out; merge-topk: an existing one.",
    )
    k: int | None = Field(None, ge=1, description="merge-topk: how many of the run's best checkpoints.")
    split: Literal["eval", "sft_eval"] | None = Field(None, description="merge-topk: rows that judge the result.")


TAKES: dict[Kind, set[str]] = {"convert-wsd": {"run"}, "sft": {"run"}, "merge-topk": {"run", "k", "split"}}
# What each command reads of the configuration, the most telling first; a form shows these.
USES: dict[Kind, tuple[str, ...]] = {
    "prepare-data": ("data", "train"),
    "tokenize": ("data", "model", "wsd", "sft"),
    "convert-wsd": ("wsd", "train", "lora", "noise", "loss", "model", "data"),
    "sft": ("sft", "train", "lora", "noise", "loss", "model", "data"),
    "merge-topk": ("train", "model", "data"),
    "benchmark": ("decode", "model", "engine", "train", "data"),
    "calibrate": ("calibrate", "decode", "model", "engine"),
}


def check_options(kind: Kind, raw: dict[str, Any]) -> Options:
    """Raises UsageError for an option that the kind does not take, or a run's name that is not a plain one."""
    try:
        options = Options.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"'options.{'.'.join(str(part) for part in first['loc'])}': {first['msg']}") from None
    given = {name for name, value in options if value is not None}
    if extra := given - TAKES.get(kind, set()):
        raise UsageError(f"'options.{min(extra)}': {kind} does not take it")
    if options.run is not None and not NAME.fullmatch(options.run):
        raise UsageError("'options.run': a folder's name of letters, digits, '.', '_' and '-'")
    if kind == "merge-topk" and options.run is None:
        raise UsageError("'options.run': merge-topk needs the run whose checkpoints it averages")
    return options


def job_config(base: Config, overrides: dict[str, Any], workspace: Path) -> Config:
    """The server's configuration with a job's overrides. Raises ConfigError, naming the key.

    No command of a job reads the sections server and jobs, which hold the database's password: they are left out.
    """
    for section in overrides:
        if section not in SECTIONS:
            raise ConfigError(f"'config.{section}': a job may set {', '.join(SECTIONS)}")
    config = parse_config(_merged(base.model_dump(mode="json", exclude={"server", "jobs"}), overrides), "config")
    if config.model.trust_remote_code:
        raise ConfigError("'config.model.trust_remote_code': a job may not run code from elsewhere")
    named: dict[str, str | None] = {"data.source_tokenizer": config.data.source_tokenizer}
    named |= {f"data.sources.{index}.path": source.path for index, source in enumerate(config.data.sources)}
    if "base" in overrides.get("model", {}):  # what the server was started with may lie anywhere
        named["model.base"] = config.model.base
    known = {source.path for source in base.data.sources}
    for index, source in enumerate(config.data.sources):
        if "://" in (source.path or "") and source.path not in known:
            raise ConfigError(
                f"'config.data.sources.{index}.path': a job may not open a URL that the server does not name"
            )
    for key, path in named.items():
        if path is not None and not _is_inside(path, workspace):
            raise ConfigError(f"'config.{key}': {path} lies outside the workspace")
    return config


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def _is_inside(path: str, workspace: Path) -> bool:
    """Links are followed. A hub name (owner/name) reads as a path inside, which does no harm."""
    try:
        return (workspace / path).resolve().is_relative_to(workspace.resolve())
    except (ValueError, OSError):  # a NUL byte, a name that is too long, links in a circle
        return False


def command(python: str, kind: str, options: Options, job_id: str, folder: Path, *, resume: bool) -> list[str]:
    """The command line of a job whose configuration is FOLDER/config.json."""
    line = [python, "-m", "hildanext.cli", kind, "--json", "--config", str(folder / "config.json")]
    if kind in TRAINING:
        line += ["--run", options.run or job_id] + (["--resume"] if resume else [])
    if kind == "merge-topk":
        line += ["--run", str(options.run)]
        line += ["--k", str(options.k)] if options.k is not None else []
        line += ["--split", options.split] if options.split is not None else []
    if kind == "benchmark":
        line += ["--out", str(folder / "benchmark.json")]
    if kind == "calibrate":
        line += ["--out", str(folder / "calibrate")]
    return line
