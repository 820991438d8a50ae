"""A server whose engine stands still until the test lets it step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hildanext.config import Config, parse_config
from hildanext.decoding.engines import Completion, Event, Request, Stats
from hildanext.decoding.engines.dummy import DummyEngine
from hildanext.decoding.events import Finished, Step
from hildanext.server.command import open_jobs
from hildanext.server.worker import Worker
from support import serving, waiting


class Stepping(DummyEngine):
    """Two slots; a request takes as many passes as its budget has tokens. With `held`, a pass waits for `go`."""

    slots = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config, {})
        self.go = threading.Semaphore(0)
        self.held = False
        self.server: Any = None  # the one that it is in
        self.seconds = 1.0  # that an answer says it took
        self.waiting: list[list[Any]] = []
        self.submitted = self.cancelled = self.passes = 0

    def submit(self, request: Request) -> object:
        self.submitted += 1
        self.waiting.append([request, 0, key := object()])
        return key

    def cancel(self, handle: object) -> None:
        self.cancelled += 1
        self.waiting = [one for one in self.waiting if one[2] is not handle]

    def step(self) -> list[tuple[object, Event]]:
        if self.held:
            self.go.acquire()
        self.passes += 1
        events: list[tuple[object, Event]] = []
        for one in self.waiting[: self.slots]:
            request, n, handle = one
            events.append((handle, Step(n, 0, [65], [0], [], [1.0], 1.0, n)))
            events.append((handle, Finished(n, [65], "A")))
            one[1] += 1
            if one[1] == request.settings.max_new_tokens:
                events.append((handle, self._done(request)))
        self.waiting = [one for one in self.waiting if one[1] < one[0].settings.max_new_tokens]
        return events

    def _done(self, request: Request) -> Completion:
        n = request.settings.max_new_tokens
        text = bytes(request.prompt_ids).decode() + "A" * n
        return Completion(
            text,
            [65] * n,
            "length",
            "dummy",
            {},
            "Q_MODE",
            0.7,
            0.5,
            Stats(n, 0, 1.0, [1.0] * n, n, 0, self.seconds, n),
        )


@contextlib.contextmanager
def stepping(*, held: bool = False, with_jobs: bool = False, **settings: Any) -> Iterator[tuple[str, Worker, Stepping]]:
    config = parse_config({"engine": {"order": ["dummy"]}, "server": settings})
    engine = Stepping(config)
    jobs = open_jobs(config) if with_jobs else None
    with serving.stoppable(config, lambda config: engine, jobs=jobs) as (url, worker, engine.server):
        engine.held = held
        try:
            yield url, worker, engine
        finally:
            engine.held = False
            engine.go.release(10_000)


def until(worker: Worker, condition: Callable[[], Any]) -> None:
    """Wait for what another thread is about to do; fail at once where the worker has stopped."""

    def reached() -> bool:
        if condition():
            return True
        assert worker.state in ("ready", "failing")
        return False

    waiting.until(reached)


def passed(worker: Worker) -> None:
    """Let the deadline of all that runs and waits have passed."""
    for ticket in list(worker.accepted):
        ticket.deadline = 0.0
