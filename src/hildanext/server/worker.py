"""The one thread that owns the engine: requests come in through a queue, what happens to them goes back to the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from hildanext.config import Config
from hildanext.decode import Finished, Step
from hildanext.engines import Completion, Engine, Event, Request, Steps, as_steps
from hildanext.errors import HildaError, ModelError
from hildanext.server.meters import Meters

State = Literal["loading", "ready", "failing", "stopping", "stopped"]


class Overloaded(HildaError):
    """All slots and places in the queue are taken."""


class Unready(HildaError):
    """The model is loading, or the server is stopping."""


class NoBase(HildaError):
    """There is no AR base to answer."""


class DeadlineError(HildaError):
    """A request did not finish in its time."""


class Ticket:
    """A request that was accepted, and what has happened to it and was not fetched yet."""

    def __init__(self, request: Request, deadline_s: float, *, wants_steps: bool) -> None:
        self.request, self.began, self.wants_steps = request, time.monotonic(), wants_steps
        self.deadline = self.began + deadline_s
        self.news: list[Event | HildaError] = []
        self.has_news = asyncio.Event()
        self.has_block = False
        self.handle: Any = None  # the engine's, once it has seen the request


class Worker:
    """Accepts up to slots + `server.queue` requests. Every accepted one gets a Completion or one error, unless dropped."""

    def __init__(self, config: Config, open_engine: Callable[[Config], Engine], meters: Meters) -> None:
        self.config, self.open_engine, self.meters = config, open_engine, meters
        self.engine: Engine | None = None
        self.state: State = "loading"
        self.failure: HildaError | None = None
        self.is_open = asyncio.Event()  # set when the engine is open, or could not be opened
        self.accepted: set[Ticket] = set()  # the event loop's
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._thread = threading.Thread(target=self._run, name="engine")
        meters.queued.set_function(lambda: self.n_queued)
        meters.running.set_function(lambda: len(self.accepted) - self.n_queued)
        self._under_way: dict[Any, Ticket] = {}  # the thread's

    def start(self, on_failure: Callable[[], object]) -> None:
        """Open the engine in the thread. Called in the event loop that requests will come from; it hears of a failure."""
        self.on_failure = on_failure
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Drop what runs, close the engine and wait for the thread. Called outside the event loop, which must still run."""
        self._inbox.put(("stop", None))
        self._thread.join()
        self._encoder.shutdown()

    # --- The event loop's side

    def opened(self) -> Engine:
        """The engine. Raises Unready while there is none."""
        if self.engine is None or self.state not in ("ready", "failing"):
            raise Unready(f"the server is {self.state}")
        return self.engine

    async def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids, made in a thread of its own: a long prompt takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self.opened().encode, prompt)

    @property
    def n_queued(self) -> int:
        return max(0, len(self.accepted) - (self.engine.slots if self.engine else 0))

    def accept(self, request: Request, deadline_s: float, *, wants_steps: bool) -> Ticket:
        """Raises Overloaded when the queue is full, Unready while nothing can be answered."""
        if len(self.accepted) >= self.opened().slots + self.config.server.queue:
            raise Overloaded(f"{len(self.accepted)} requests are waiting or running (server.queue); try again later")
        ticket = Ticket(request, deadline_s, wants_steps=wants_steps)
        self.accepted.add(ticket)
        self._inbox.put(("submit", ticket))
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its slot is free within a pass. Harmless for one that is done."""
        if ticket in self.accepted:
            self.accepted.discard(ticket)
            self._inbox.put(("drop", ticket))

    async def events(self, ticket: Ticket) -> AsyncIterator[list[Event]]:
        """What happens to an accepted request, to its Completion; each time all that has come since the last look.

        Raises HildaError; leaving early drops the request.
        """
        try:
            while True:
                await ticket.has_news.wait()
                ticket.has_news.clear()
                news, ticket.news = ticket.news, []
                if events := [what for what in news if not isinstance(what, HildaError)]:
                    yield events
                if isinstance(news[-1], HildaError):
                    raise news[-1]
                if isinstance(news[-1], Completion):
                    return
        finally:
            self.drop(ticket)

    def _deliver(self, news: list[tuple[Ticket, Event | HildaError]]) -> None:
        for ticket, what in news:
            ticket.news.append(what)
            ticket.has_news.set()
            if isinstance(what, Finished) and not ticket.has_block:
                ticket.has_block = True
                self.meters.first_block.observe(time.monotonic() - ticket.began)
            if isinstance(what, Completion):
                self.meters.completed(what.stats, len(what.token_ids))
            if isinstance(what, (Completion, HildaError)):
                self.accepted.discard(ticket)

    # --- The thread's side

    def _run(self) -> None:
        try:
            engine = self.open_engine(self.config)
            settings = engine.settings(self.config)._replace(max_new_tokens=1)
            engine.generate(Request(engine.encode("Hello"), settings))  # ready means: it has answered
        except Exception as error:  # noqa: BLE001  (the loader may fail in any way)
            self.failure = error if isinstance(error, HildaError) else _failure(error)
            self.state = "stopped"
            self.loop.call_soon_threadsafe(self.on_failure)
            self.loop.call_soon_threadsafe(self.is_open.set)
            return
        self.engine, self.state = engine, "ready"
        self.loop.call_soon_threadsafe(self.is_open.set)
        steps = as_steps(engine)
        while self._take_in(steps):
            self._move_on(steps)
        self._fail(steps, Unready("the server is stopping"))
        engine.close()
        self.state = "stopped"

    def _take_in(self, steps: Steps) -> bool:
        """Hand new requests to the engine and take dropped ones from it; wait if there is nothing else to do."""
        while not self._under_way or not self._inbox.empty():
            what, ticket = self._inbox.get()
            if ticket is None:
                return False
            if what == "drop":
                if self._under_way.pop(ticket.handle, None) is not None:
                    steps.cancel(ticket.handle)
                continue
            try:
                ticket.handle = steps.submit(ticket.request)
                self._under_way[ticket.handle] = ticket
            except HildaError as error:
                self._tell([(ticket, error)])
        return True

    def _move_on(self, steps: Steps) -> None:
        """One pass of everything that runs."""
        try:
            happened = steps.step()
        except Exception as error:  # noqa: BLE001  (these requests fail, the next ones have their chance)
            self.state = "failing"
            self._fail(steps, error if isinstance(error, HildaError) else _failure(error))
            return
        self.state = "ready"
        self.meters.batch.observe(steps.n_running)
        mine = [(self._under_way[handle], what) for handle, what in happened if handle in self._under_way]
        # To wake the event loop costs more than the rule of a pass: not for what nobody looks at.
        news = [(ticket, what) for ticket, what in mine if ticket.wants_steps or not isinstance(what, Step)]
        for ticket, what in news:
            if isinstance(what, (Completion, HildaError)):
                del self._under_way[ticket.handle]
        now = time.monotonic()
        for ticket in [ticket for ticket in self._under_way.values() if now > ticket.deadline]:
            steps.cancel(ticket.handle)
            del self._under_way[ticket.handle]
            news.append((ticket, DeadlineError("the deadline passed before the answer was complete")))
        self._tell(news)

    def _fail(self, steps: Steps, error: HildaError) -> None:
        for handle in self._under_way:
            steps.cancel(handle)
        self._tell([(ticket, error) for ticket in self._under_way.values()])
        self._under_way.clear()

    def _tell(self, news: list[tuple[Ticket, Event | HildaError]]) -> None:
        if news:
            self.loop.call_soon_threadsafe(self._deliver, news)


def _failure(error: Exception) -> ModelError:
    """An error that nobody foresaw: the whole of it for the log, one line for the client."""
    traceback.print_exception(error)
    return ModelError(f"the engine failed: {type(error).__name__}; the server's log has more")
