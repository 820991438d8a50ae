"""A run's folder: the resolved configuration and versions, metrics.jsonl, curves.png and checkpoints/step-N."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.errors import UsageError
from hildanext.files import atomic_open, write_json
from hildanext.provenance import git_revision, versions

# May change between a run and its resume: they do not touch the numbers, or (how a step fits the machine) their rounding only.
FREE_ON_RESUME = {
    *(("train", key) for key in ("keep_last", "keep_best", "save_every")),
    *(("train", key) for key in ("micro_batch", "gradient_checkpointing", "attention", "sharding")),
    ("paths", "runs"),
    ("data", "workers"),
}


def run_path(config: Config, name: str) -> Path:
    """Folder of the run `name`. Raises UsageError for a name that would lead out of `paths.runs`."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise UsageError(f"--run '{name}': a run's name is one folder name; set paths.runs to put it elsewhere")
    return Path(config.paths.runs) / name


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{section}.{key}"
        for section in old
        for key in old[section]
        if old[section][key] != new.get(section, {}).get(key) and (section, key) not in FREE_ON_RESUME
    ]


class RunFolder:
    """Paths of one run and its append-only metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.record = path / "config.json"

    @classmethod
    def open(cls, config: Config, name: str, command: str, resume: bool) -> RunFolder:
        """`runs/NAME` for a new run or a resumed one; writes nothing, so that what is refused later leaves no run behind.

        Raises UsageError when a run of that name exists and resume is not asked for, when there is none to resume, or
        when the configuration differs from the run's in a key that changes the numbers (the keys are named).
        """
        run = cls(run_path(config, name))
        if resume:
            if not run.record.is_file():
                raise UsageError(f"--resume: no run in {run.path}; start it without --resume")
            old = json.loads(run.record.read_text(encoding="utf-8"))
            if old["command"] != command:
                raise UsageError(f"--resume: {run.path} is a '{old['command']}' run, not '{command}'")
            relevant = {
                key: value for key, value in old["config"].items() if key not in ("decode", "engine", "server", "jobs")
            }
            if changed := _differences(relevant, config.model_dump(mode="json")):
                raise UsageError(
                    f"--resume: the configuration differs from the run's in {', '.join(changed)}; restore it"
                )
            return run
        if run.record.exists():
            raise UsageError(
                f"{run.path} already holds a run; continue it with --resume or choose another name with --run"
            )
        return run

    def begin(self, config: Config, command: str) -> None:
        """Write what the run is made of: command, seed, resolved configuration, versions, git revision."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        # What no training reads, and which may hold a database's password, is left out.
        made_of = config.model_dump(mode="json", exclude={"server", "jobs"})
        record = {"command": command, "seed": config.train.seed, "config": made_of}
        write_json(self.record, record | {"versions": versions(), "git": git_revision()})

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl; a half-written last line (a killed run) is left out."""
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
        """Drop what was logged after `step`, so that a resumed run's file equals an undisturbed one's."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        with atomic_open(self.metrics) as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)

    def log(self, row: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
