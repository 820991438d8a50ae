"""What a job may open: files in the server's folder, and what the server's configuration itself names.

The server checks a request with `check_names`. Later a path may lead elsewhere: a glob matches new files, a folder
becomes a symbolic link, a checkpoint names its base. So the job's process checks again whenever something is opened:
`confine` adds an audit hook, which no code can remove. It hears of every file that Python opens, and of these events,
which the packages raise before they open what a configuration names:

    hildanext.path (path), hildanext.url (URL), hildanext.model (name), hildanext.reference (name, other)

The last one says that a model names another model as its base.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hildanext.config import Config
from hildanext.config.model import is_hub_name, is_packaged
from hildanext.errors import ConfigError, UsageError

REMOTE = "a job may open only URLs and hub models of the server's configuration"
LOCAL_TRACKER = "tensorboard"  # writes files only; the others may send to a server
HUB = "hub"  # the path of a tinystories source that is downloaded
ADAPTER = "adapter_config.json"


class Reach(NamedTuple):
    """Files and folders that a job may open, as real paths, and the URLs, hub models and trackers that it may ask for."""

    roots: list[str]
    names: list[str]
    model: str  # `model.base` of the server


def _named(config: Config) -> Iterator[tuple[str, str, bool]]:
    """Yield (key, value, whether it is a URL or a hub model) for each key that names something to open."""
    yield "model.base", config.model.base, is_hub_name(config.model.base)
    if (tokenizer := config.data.source_tokenizer) is not None:
        yield "data.source_tokenizer", tokenizer, is_hub_name(tokenizer)
    for index, source in enumerate(config.data.sources):
        if source.path is not None:
            is_remote = "://" in source.path or (source.kind == "tinystories" and source.path == HUB)
            yield f"data.sources.{index}.path", source.path, is_remote


def reach_of(config: Config, workspace: Path) -> Reach:
    """What the jobs of a server with this configuration may open: also the models that its model was made from."""
    named = {name: is_remote for _, name, is_remote in _named(config)}
    named |= {name: is_hub_name(name) for name in _bases(config.model.base)}
    paths = [".", config.paths.runs, config.paths.data]
    for name in (name for name, is_remote in named.items() if not is_remote and not is_packaged(name)):
        before, *wildcards = re.split(r"[*?\[]", name, maxsplit=1)
        paths.append(before.rpartition("/")[0] if wildcards else name)
        if name.endswith(".npy"):
            paths.append(name.removesuffix(".npy") + ".csv.gz")  # the boundaries of its documents
    home = workspace.resolve()
    roots = {(home / path).resolve() for path in paths}
    # A pattern such as /*.jsonl must not open the whole disk.
    kept = [str(root) for root in sorted(roots) if root == home or not home.is_relative_to(root)]
    remote = [name for name, is_remote in named.items() if is_remote]
    remote += [f"tracker:{name}" for name in config.train.trackers if name != LOCAL_TRACKER]
    return Reach(kept, sorted(remote), config.model.base)


def _bases(name: str) -> Iterator[str]:
    """Yield the models that the folder of a model refers to, and those that they refer to."""
    seen, waiting = {name}, [name]
    while waiting:
        folder = Path(waiting.pop())
        for other in {*_referred(folder / "config.json"), *_referred(folder / ADAPTER)} - seen:
            seen.add(other)
            waiting.append(other)
            yield other


def _referred(file: Path) -> set[str]:
    """The models that config.json or an adapter's settings name; none if the file cannot be read."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        record = stored.get("hilda", {})
        found = [record.get("base_model"), record.get("adapter", {}).get("base"), stored.get("base_model_name_or_path")]
    except (OSError, ValueError, AttributeError):  # AttributeError: not an object
        return set()
    return {name for name in found if isinstance(name, str) and name}


def check_names(server: Config, job: Config, reach: Reach) -> None:
    """Raise ConfigError, which names the key, if a job's configuration names something out of reach."""
    for key, name, is_remote in _named(job):
        if not is_packaged(name) and not _is_inside(name, reach.roots):
            raise ConfigError(f"'config.{key}': {name} is outside the workspace")
        if is_remote and name not in reach.names:
            raise ConfigError(f"'config.{key}': {REMOTE}, not '{name}'")
    for tracker in job.train.trackers:
        if tracker != LOCAL_TRACKER and f"tracker:{tracker}" not in reach.names:
            raise ConfigError(
                f"'config.train.trackers': a job may use only trackers of the server's configuration, not '{tracker}'"
            )
    if is_hub_name(job.model.base) and job.model.revision != server.model.revision:
        raise ConfigError("'config.model.revision': a job may use a hub model only at the server's revision")


def _is_inside(path: str, roots: list[str]) -> bool:
    """Whether a path is one of `roots` or in one of them, all symbolic links resolved."""
    try:
        real = Path(path).resolve()
    except (ValueError, OSError, RuntimeError):  # a NUL byte, a name that is too long, a loop of links
        return False
    return any(real.is_relative_to(root) for root in roots)


def confine(file: Path) -> None:
    """Let this process open only what the `Reach` in a JSON file allows, for good.

    Everything else that a configuration names, and every path inside the workspace that leads out of it, is a UsageError.
    """
    sys.addaudithook(Hook(Reach(**json.loads(file.read_text(encoding="utf-8")))))


class Hook:
    """An audit hook that raises UsageError for what is out of reach."""

    def __init__(self, reach: Reach) -> None:
        self.roots, self.names = list(reach.roots), set(reach.names)
        self.unchecked = tuple({os.path.join(sys.prefix, ""), os.path.join(sys.base_prefix, "")})  # Python's own files
        self.trusted = {reach.model}  # the server's model, and the models that it refers to

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            self._opened(os.path.abspath(os.fsdecode(args[0])))
        elif event == "hildanext.path":
            self._check(str(args[0]))
        elif event == "hildanext.url" and args[0] not in self.names:
            raise UsageError(f"{args[0]}: {REMOTE}")
        elif event == "hildanext.model":
            self._model(args[0])
        elif event == "hildanext.reference":
            self._reference(*args)
        elif event in ("socket.connect", "socket.getaddrinfo") and not self.names:
            self._connected(event, args)

    def _opened(self, path: str) -> None:
        if not path.startswith(self.unchecked) and any(Path(path).is_relative_to(root) for root in self.roots):
            self._check(path)

    def _check(self, path: str) -> None:
        if not _is_inside(path, self.roots):
            raise UsageError(
                f"{path}: is outside the workspace; a job may open only files in the server's folder, and those that the "
                "server's configuration names"
            )

    def _model(self, name: str) -> None:
        """Check a model, all files of its folder, and the base that transformers loads under an adapter."""
        if is_hub_name(name):
            if name not in self.names and name not in self.trusted:
                raise UsageError(f"model '{name}': {REMOTE}")
            return
        self._check(name)
        for folder, folders, files in os.walk(name):
            for entry in (*folders, *files):
                if os.path.islink(path := os.path.join(folder, entry)):
                    self._check(path)
        for base in _referred(Path(name) / ADAPTER):
            if not is_packaged(base):
                self._model(base)

    def _reference(self, name: str, other: str) -> None:
        """Trust what the server's model refers to; `reach_of` has not seen it if that model is on the hub."""
        if name in self.trusted:
            self.trusted.add(other)
            if not is_hub_name(other):
                self.roots.append(os.path.realpath(other))

    def _connected(self, event: str, args: tuple[Any, ...]) -> None:
        is_local = event == "socket.connect" and isinstance(args[1], (str, bytes))  # the path of a Unix socket
        if not is_local:
            raise UsageError(
                "the network is closed to this job: the server's configuration names no URL, hub model or tracker"
            )
