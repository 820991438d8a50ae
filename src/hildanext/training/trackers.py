"""Trackers of a run (`train.trackers`): every line of metrics.jsonl also goes to TensorBoard, wandb, MLflow, ...

The trackers are accelerate's. They get each step's numbers once, under the names and steps of metrics.jsonl. The file
trackers.json in the run's folder says which run of a tool belongs to this one and how far it got, so that a resumed run
continues it. A tracker that fails is left out; the training goes on.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from operator import attrgetter
from typing import Any
from uuid import uuid4

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from hildanext.config import Config, TrainConfig
from hildanext.errors import ConfigError, HildaError
from hildanext.files import write_json
from hildanext.progress import say
from hildanext.training.run_folder import READ_BY, RunFolder

# Sends a line of metrics.jsonl to the trackers.
Track = Callable[[dict[str, Any]], None]

PROJECT = "hildanext"  # the project or experiment of tools that have one
# The tools that can continue a run, and what identifies a run of theirs. The others begin a new one.
IDENTITY: dict[str, Callable[[Any], str]] = {
    "tensorboard": lambda writer: "tensorboard",
    "wandb": attrgetter("id"),
    "trackio": attrgetter("name"),
    "mlflow": attrgetter("info.run_id"),
}


def check_trackers(train: TrainConfig) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in train.trackers:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # None: a folder of that name, such as wandb's own files
            package = name.replace("_", "-")
            raise ConfigError(
                f"'train.trackers': '{name}' needs the package {package}, which is not installed: pip install {package}"
            )


class RunTracker:
    """A tracker of a run. `sent`: the last step that its tool has."""

    def __init__(self, name: str, config: Config, command: str, run: RunFolder, step: int) -> None:
        """Begin a run of the tool, or continue the one of an earlier start. step: steps of the run that are kept."""
        self.name = name
        known, sent = _read_record(run).get(name, (None, None))
        if known is None:
            self.sent = 0
        else:  # without a record of its last step it got all lines that were written
            self.sent = max([row["step"] for row in run.read_metrics()], default=0) if sent is None else sent
        if name == "tensorboard":
            self.sent = min(self.sent, step)  # it forgets what comes after
        run.path.mkdir(parents=True, exist_ok=True)
        project = "tensorboard" if name == "tensorboard" else PROJECT
        self.tracker = LOGGER_TYPE_TO_CLASS[name](project, **_options(name, run, known, self.sent))
        self.tracker.start()
        self.identity = IDENTITY[name](self.tracker.tracker) if name in IDENTITY else None
        if known is None:
            self.tracker.store_init_configuration(public_settings(config, command))

    def send(self, row: dict[str, Any]) -> None:
        """Send the numbers of a line, unless the tool has this step already."""
        if row["step"] > self.sent:
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
            self.tracker.log(numbers, step=row["step"])
            self.sent = row["step"]


def _options(name: str, run: RunFolder, known: str | None, sent: int) -> dict[str, Any]:
    """Options of accelerate's tracker: a name for a new run of the tool, or the run `known` and the last step it has."""
    folder = str(run.path)
    if name == "tensorboard":
        return {"logging_dir": folder, "purge_step": sent + 1}
    if name == "wandb":
        return {"dir": folder} | ({"name": run.path.name} if known is None else {"id": known, "resume": "allow"})
    if name == "trackio":
        # found again by its name, which other runs of the project may have
        return {"name": f"{run.path.name}-{uuid4().hex[:8]}"} if known is None else {"name": known, "resume": "allow"}
    if name == "mlflow":
        return {"run_name": run.path.name} if known is None else {"run_id": known}
    more = {"aim": {"logging_dir": str(run.path.parent)}, "dvclive": {"dir": f"{folder}/dvclive"}}
    return more.get(name, {})


def _read_record(run: RunFolder) -> dict[str, tuple[str | None, int | None]]:
    """By tracker: the run of its tool, and the last step that it got; None while it runs, or after a kill."""
    if not run.trackers.is_file():
        return {}
    return {name: (kept["run"], kept["step"]) for name, kept in json.loads(run.trackers.read_text("utf-8")).items()}


def _write_record(run: RunFolder, trackers: list[RunTracker], running: bool) -> None:
    now = {tracker.name: (tracker.identity, None if running else tracker.sent) for tracker in trackers}
    record = {name: {"run": tool_run, "step": step} for name, (tool_run, step) in (_read_record(run) | now).items()}
    write_json(run.trackers, record)


@contextmanager
def tracking(names: Sequence[str], config: Config, command: str, run: RunFolder, step: int) -> Iterator[Track]:
    """Start trackers, send them the lines that they lack up to `step`, and yield the function for the next lines.

    Raises ConfigError for a tracker that cannot start. A tracker that fails later costs a message.
    """
    trackers: list[RunTracker] = []

    def track(row: dict[str, Any]) -> None:
        for tracker in list(trackers):
            with _left_out_if_failing(tracker, trackers, run):
                tracker.send(row)

    try:
        for name in dict.fromkeys(names):
            with _starting(name):
                trackers.append(RunTracker(name, config, command, run, step))
        if trackers:
            _write_record(run, trackers, running=True)
            for row in run.read_metrics():
                if row["step"] <= step:
                    track(row)
        yield track
    finally:
        if trackers:
            _write_record(run, trackers, running=False)
        for tracker in list(trackers):
            with _left_out_if_failing(tracker, trackers, run):
                tracker.tracker.finish()


@contextmanager
def _starting(name: str) -> Iterator[None]:
    """Raises ConfigError if a tracker cannot start in the block: no login, no server, a package of another version."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command's result
            yield
    except HildaError:
        raise
    except Exception as error:  # noqa: BLE001  (a tool raises what it likes)
        raise ConfigError(
            f"'train.trackers': '{name}' cannot start ({_line(error)}); set it up, or leave it out"
        ) from None


@contextmanager
def _left_out_if_failing(tracker: RunTracker, trackers: list[RunTracker], run: RunFolder) -> Iterator[None]:
    """If a tracker fails in the block, say so, keep what it got and go on without it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # noqa: BLE001  (a tool raises what it likes)
        _write_record(run, [tracker], running=False)
        trackers.remove(tracker)
        say(
            f"train.trackers: '{tracker.name}' failed after step {tracker.sent} ({_line(error)}); the run goes on without "
            "it, and --resume sends it the rest"
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def public_settings(config: Config, command: str) -> dict[str, bool | int | float | str]:
    """The sections that a command reads as `section.key`, lists as JSON. Addresses lose queries and passwords."""
    sections = config.model_dump(mode="json", include=READ_BY[command])
    flat = {f"{section}.{key}": _public(value) for section, keys in sections.items() for key, value in keys.items()}
    return {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for key, value in flat.items()
    }


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and "://" in value:
        scheme, _, rest = re.split(r"[?#]", value, maxsplit=1)[0].partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return value
