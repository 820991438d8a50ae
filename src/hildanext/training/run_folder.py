"""The folder of a run: config.json (settings and versions), metrics.jsonl, curves.png, checkpoints/step-N, trackers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.errors import UsageError
from hildanext.files import atomic_open, write_json
from hildanext.provenance import git_revision, versions

# Sections of the configuration that each command reads. The others may change on resume.
READ_BY = {
    "convert-wsd": {"paths", "model", "data", "noise", "loss", "wsd", "train", "lora"},
    "sft": {"paths", "model", "data", "noise", "loss", "sft", "train", "lora"},
    "dpo": {"paths", "model", "data", "dpo", "train", "lora"},
}

# Keys of them that may change on resume: they do not affect the results, or (micro_batch to sharding) only their rounding.
MAY_CHANGE_ON_RESUME = {
    *(("train", key) for key in ("keep_last", "keep_best", "save_every", "trackers")),
    *(("train", key) for key in ("micro_batch", "gradient_checkpointing", "attention", "sharding")),
    ("paths", "runs"),
    ("data", "workers"),
}


def run_path(config: Config, name: str) -> Path:
    """Folder of the run `name`. Raises UsageError for a name that is not a single folder name, and for a file."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise UsageError(f"--run '{name}': must be a single folder name; set paths.runs to change the parent folder")
    path = Path(config.paths.runs) / name
    sys.audit("hildanext.path", path)  # a job may be denied it, see `jobs.reach`
    if path.exists() and not path.is_dir():
        raise UsageError(f"--run '{name}': {path} is a file; choose another name")
    return path


def _check_resumable(path: Path, record: dict[str, Any], config: Config, command: str) -> None:
    """Raise UsageError if a run's config.json has another command or differs in keys that may not change."""
    if record["command"] != command:
        raise UsageError(f"--resume: {path} is a '{record['command']}' run, not '{command}'; choose another --run")
    new = config.model_dump(mode="json")
    changed = [
        f"{section}.{key}"
        for section, keys in record["config"].items()
        if section in READ_BY[command]
        for key, value in keys.items()
        if value != new.get(section, {}).get(key) and (section, key) not in MAY_CHANGE_ON_RESUME
    ]
    if changed:
        raise UsageError(
            f"--resume: the configuration differs from the run's in {', '.join(changed)}; restore the values in "
            f"{path / 'config.json'}"
        )


class RunFolder:
    """Paths of a run, and its append-only metrics file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.record = path / "config.json"
        self.trackers = path / "trackers.json"

    @classmethod
    def open(cls, config: Config, name: str, command: str, resume: bool) -> RunFolder:
        """The folder of a new or resumed run. Writes nothing, so that a later error leaves no empty run behind.

        Raises UsageError if a new run's folder already holds a run, if there is no run to resume, if the run belongs to
        another command, or if the configuration differs in keys that may not change on resume (the message names them).
        """
        run = cls(run_path(config, name))
        if resume:
            if not run.record.is_file():
                raise UsageError(f"--resume: no run in {run.path}; start it without --resume")
            _check_resumable(run.path, json.loads(run.record.read_text(encoding="utf-8")), config, command)
        elif run.record.exists():
            raise UsageError(
                f"{run.path} already holds a run; continue it with --resume or choose another name with --run"
            )
        return run

    def begin(self, config: Config, command: str) -> None:
        """Create the folder and write config.json: command, seed, resolved configuration, versions, git revision."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        # Training does not use `server` and `jobs`, which can contain a database password.
        resolved = config.model_dump(mode="json", exclude={"server", "jobs"})
        record = {"command": command, "seed": config.train.seed, "config": resolved}
        write_json(self.record, record | {"versions": versions(), "git": git_revision()})

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl. An incomplete last line, left by a killed run, is skipped."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Remove the lines after `step`, so that a resumed run's file equals that of an uninterrupted run."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        with atomic_open(self.metrics) as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and flush it to the operating system."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
