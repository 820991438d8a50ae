"""The one thread that owns the engine: requests come in through a queue, what happens to them goes back to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from hildanext.config import Config
from hildanext.decoding.engines import Completion, Engine, Event, Request, Steps, as_steps
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.settings import Settings
from hildanext.errors import HildaError, ModelError
from hildanext.server.meters import Meters

STOP_S = 5.0
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
    """A request that has a place, and what has happened to it and was not fetched yet."""

    def __init__(self, settings: Settings, deadline_s: float, *, wants_steps: bool) -> None:
        self.request, self.began, self.wants_steps = Request([], settings), time.monotonic(), wants_steps
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
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        meters.queued.set_function(lambda: self.n_queued)
        meters.running.set_function(lambda: len(self.accepted) - self.n_queued)
        self._under_way: dict[Any, Ticket] = {}  # the thread's

    def start(self, on_failure: Callable[[], object]) -> None:
        """Open the engine in the thread. Called in the event loop that requests will come from; it hears of a failure."""
        self.on_failure = on_failure
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Drop what runs and close the engine. Called outside the event loop, which must still run.

        A loading or a pass that takes longer than STOP_S is left behind, to end with the process.
        """
        self._inbox.put(("stop", None))
        self._thread.join(STOP_S)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    # --- The event loop's side

    def opened(self) -> Engine:
        """The engine. Raises Unready while there is none."""
        if self.engine is None or self.state not in ("ready", "failing"):
            raise Unready(f"the server is {self.state}")
        return self.engine

    @property
    def n_queued(self) -> int:
        return max(0, len(self.accepted) - (self.engine.slots if self.engine else 0))

    async def accept(
        self, prompt: str | list[dict[str, str]], settings: Settings, deadline_s: float, *, wants_steps: bool
    ) -> Ticket:
        """Give a prompt a place, and its tokens to the engine.

        Raises Overloaded when the queue is full, Unready while nothing can be answered, DeadlineError, and what is wrong
        with the prompt.
        """
        engine = self.opened()
        if len(self.accepted) >= engine.slots + self.config.server.queue:
            raise Overloaded(f"{len(self.accepted)} requests are waiting or running (server.queue); try again later")
        ticket = Ticket(settings, deadline_s, wants_steps=wants_steps)
        self.accepted.add(ticket)
        # In a thread of its own, since a long prompt takes a while; no more wait for it than have a place.
        encoding = self.loop.run_in_executor(self._encoder, engine.encode, prompt)
        try:
            await asyncio.wait({encoding}, timeout=deadline_s)
            if not encoding.done():
                raise DeadlineError("the deadline passed before the prompt was read")
            ticket.request = Request(encoding.result(), settings)
            self.opened()  # still
        except BaseException:
            encoding.cancel()
            self.accepted.discard(ticket)
            raise
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

    def _end(self, error: HildaError) -> None:
        """The engine is no more: nobody waits for it any longer. In the event loop, so that no request slips through."""
        self._deliver([(ticket, error) for ticket in self.accepted])
        if self.failure is not None:
            self.on_failure()

    # --- The thread's side

    def _run(self) -> None:
        try:
            engine = self.open_engine(self.config)
            settings = engine.settings(self.config)._replace(max_new_tokens=1)
            engine.generate(Request(engine.encode("Hello"), settings))  # ready means: it has answered
        except Exception as error:  # noqa: BLE001  (the loader may fail in any way)
            self.failure = _failure(error)
            self.state = "stopped"
            self._call(self.on_failure)
            self._call(self.is_open.set)
            return
        self.engine, self.state = engine, "ready"
        self._call(self.is_open.set)
        end: HildaError = Unready("the server is stopping")
        try:
            self._serve(as_steps(engine))
        except Exception as error:  # noqa: BLE001  (an engine that cannot even forget its requests is lost)
            end = self.failure = _failure(error)
        self.state = "stopped"
        self._call(self._end, end)
        engine.close()

    def _serve(self, steps: Steps) -> None:
        """Answer until told to stop. When a pass fails, so do the requests under way; the next ones have their chance."""
        while True:
            try:
                if not self._take_in(steps):
                    return
                self._move_on(steps)
            except Exception as error:  # noqa: BLE001
                self.state = "failing"
                self._fail(steps, _failure(error))

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
            except Exception as error:  # noqa: BLE001  (this request fails, the others do not)
                self._tell([(ticket, _failure(error))])
            else:
                self._under_way[ticket.handle] = ticket
        return True

    def _move_on(self, steps: Steps) -> None:
        """One pass of everything that runs."""
        assert self.engine is not None
        n_running = min(self.engine.slots, len(self._under_way))  # before the pass: after it, some have ended
        happened = steps.step()
        self.state = "ready"
        self.meters.batch.observe(n_running)
        mine = [(self._under_way[handle], what) for handle, what in happened if handle in self._under_way]
        # To wake the event loop costs more than the rule of a pass: not for what nobody looks at.
        news = [(ticket, what) for ticket, what in mine if ticket.wants_steps or not isinstance(what, Step)]
        for ticket, what in news:
            if isinstance(what, (Completion, HildaError)):
                del self._under_way[ticket.handle]
        now = time.monotonic()
        late = [ticket for ticket in self._under_way.values() if now > ticket.deadline]
        news += [(ticket, DeadlineError("the deadline passed before the answer was complete")) for ticket in late]
        self._tell(news)
        for ticket in late:
            del self._under_way[ticket.handle]
            steps.cancel(ticket.handle)

    def _fail(self, steps: Steps, error: HildaError) -> None:
        """Told first: to cancel after a failure may fail too."""
        failed, self._under_way = self._under_way, {}
        self._tell([(ticket, error) for ticket in failed.values()])
        for handle in failed:
            steps.cancel(handle)

    def _tell(self, news: list[tuple[Ticket, Event | HildaError]]) -> None:
        if news:
            self._call(self._deliver, news)

    def _call(self, what: Callable[..., object], *given: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(what, *given)


def _failure(error: Exception) -> HildaError:
    """Of an error that nobody foresaw the whole goes to the log, one line to the client."""
    if isinstance(error, HildaError):
        return error
    traceback.print_exception(error)
    return ModelError(f"the engine failed: {type(error).__name__}; the server's log has more")
