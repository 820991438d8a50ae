"""What a job request may contain: a command, its options, and overrides of some configuration sections.

A request can set no key that could run foreign code. `reach.py` says which files, URLs and models it can name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hildanext.config import Config, parse_config
from hildanext.errors import ConfigError, UsageError
from hildanext.jobs.reach import check_names, reach_of

Kind = Literal["prepare-data", "tokenize", "convert-wsd", "sft", "merge-topk", "benchmark", "calibrate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRAINING: tuple[Kind, ...] = ("convert-wsd", "sft")
GPU_KINDS: tuple[Kind, ...] = (*TRAINING, "merge-topk", "benchmark", "calibrate")
SECTIONS = ("model", "data", "noise", "loss", "wsd", "train", "lora", "sft", "decode", "engine", "calibrate")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Options(BaseModel):
    """Options of the commands, besides the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: str | None = Field(
        None,
        description="Run folder in paths.runs: new for training (default: the job's id), existing for merge-topk.",
    )
    k: int | None = Field(None, ge=1, description="merge-topk: number of the run's best checkpoints to average.")
    split: Literal["eval", "sft_eval"] | None = Field(
        None, description="merge-topk: held-out rows to evaluate the result on."
    )


TAKES: dict[Kind, set[str]] = {"convert-wsd": {"run"}, "sft": {"run"}, "merge-topk": {"run", "k", "split"}}
# The configuration sections that each command reads, most important first; the page's form shows them in this order.
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
    """Validate a job's options. Raises UsageError for an option the kind does not take or an invalid run name."""
    try:
        options = Options.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"'options.{'.'.join(str(part) for part in first['loc'])}': {first['msg']}") from None
    given = {name for name, value in options if value is not None}
    if extra := given - TAKES.get(kind, set()):
        raise UsageError(f"'options.{min(extra)}': {kind} does not take this option")
    if options.run is not None and not NAME.fullmatch(options.run):
        raise UsageError("'options.run': must be a folder name of letters, digits, '.', '_' and '-'")
    if kind == "merge-topk" and options.run is None:
        raise UsageError("'options.run': merge-topk needs the run whose checkpoints to average")
    return options


def job_config(base: Config, overrides: dict[str, Any], workspace: Path) -> Config:
    """Return the server's configuration with a job's overrides. Raises ConfigError that names the key.

    The sections `server` and `jobs` are left out: no job reads them, and they may hold the database's password.
    """
    for section in overrides:
        if section not in SECTIONS:
            raise ConfigError(f"'config.{section}': a job may set only {', '.join(SECTIONS)}")
    config = parse_config(_merged(base.model_dump(mode="json", exclude={"server", "jobs"}), overrides), "config")
    if config.model.trust_remote_code:
        raise ConfigError("'config.model.trust_remote_code': a job may not run remote code")
    check_names(base, config, reach_of(base, workspace))
    return config


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def command(python: str, kind: str, options: Options, job_id: str, folder: Path, *, resume: bool) -> list[str]:
    """Return the command line of a job whose configuration is FOLDER/config.json and whose reach FOLDER/reach.json."""
    line = [python, "-m", "hildanext.cli", kind, "--json", "--config", str(folder / "config.json")]
    line += ["--confine", str(folder / "reach.json")]
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
