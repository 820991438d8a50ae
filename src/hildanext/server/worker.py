"""The thread that owns the engine. Requests enter through a queue; their events return to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hildanext.config import Config
from hildanext.decoding.engines import AS_USUAL, Completion, Engine, Event, Prompt, Rendering, Request, Steps, as_steps
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.grammar import Grammar
from hildanext.decoding.settings import Settings, fill_context
from hildanext.errors import HildaError, ModelError, UsageError
from hildanext.server.meters import Meters

if TYPE_CHECKING:
    from hildanext.decoding.constraint import CompiledGrammar

STOP_S = 5.0
COMPILE_S = 10.0  # for a grammar; usual schemas take milliseconds, the first one a second
REST_S = 30.0  # without a request, until the engine frees memory, which may take some seconds
RECENT = 32  # completions whose duration says how long the next ones will take
T = TypeVar("T")
State = Literal["loading", "ready", "failing", "stopping", "stopped"]


class Overloaded(HildaError):
    """All slots and all places in the queue are in use. `wait_s`: expected seconds until a new request has a slot."""

    def __init__(self, line: str, wait_s: float) -> None:
        super().__init__(line)
        self.wait_s = wait_s


class Unready(HildaError):
    """The model is loading, or the server is stopping."""


class NoBase(HildaError):
    """The AR base is not available."""


class DeadlineError(HildaError):
    """A request passed its deadline before it finished."""


class Ticket:
    """An accepted request and its events that the route has not read yet."""

    def __init__(self, settings: Settings, deadline_s: float, *, wants_steps: bool) -> None:
        self.request, self.began, self.wants_steps = Request([], settings), time.monotonic(), wants_steps
        self.deadline = self.began + deadline_s
        self.news: list[Event | HildaError] = []
        self.has_news = asyncio.Event()
        self.has_block = False
        self.handle: Any = None  # the engine's name for the request, once submitted


class Worker:
    """Accepts up to slots + `server.queue` requests. Each ends with a Completion or one error, unless it is dropped."""

    def __init__(self, config: Config, open_engine: Callable[[Config], Engine], meters: Meters) -> None:
        self.config, self.open_engine, self.meters = config, open_engine, meters
        self.engine: Engine | None = None
        self.state: State = "loading"
        self.failure: HildaError | None = None
        self.is_open = asyncio.Event()  # set once opening has succeeded or failed
        self.accepted: set[Ticket] = set()  # used in the event loop only
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._compiler = ThreadPoolExecutor(2, thread_name_prefix="compile")  # slow schemas wait for each other only
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        meters.queued.set_function(lambda: self.n_queued)
        meters.running.set_function(lambda: len(self.accepted) - self.n_queued)
        self._running: dict[Any, Ticket] = {}  # used in the engine's thread only
        self._seconds: deque[float] = deque(maxlen=RECENT)  # that the last completions took in their slots

    def start(self, on_failure: Callable[[], object]) -> None:
        """Open the engine in the thread. Call this in the event loop that serves; `on_failure` is called there."""
        self.on_failure = on_failure
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Drop all requests and close the engine. Call this outside the event loop, which must still be running.

        A load or a pass that takes longer than STOP_S is abandoned; it ends with the process.
        """
        self._inbox.put(("stop", None))
        self._thread.join(STOP_S)
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    # --- Called in the event loop

    def opened(self) -> Engine:
        """Return the engine. Raises Unready while it is not available."""
        if self.engine is None or self.state not in ("ready", "failing"):
            raise Unready(f"the server is {self.state}")
        return self.engine

    @property
    def n_queued(self) -> int:
        return max(0, len(self.accepted) - (self.engine.slots if self.engine else 0))

    def wait_s(self) -> float:
        """Seconds until a request that came now would have a slot, if all take as long as the recent ones.

        Before the first completion, a request is taken to need as long as the oldest accepted one has been here.
        """
        slots = self.engine.slots if self.engine else 1
        now = time.monotonic()
        longest = max((now - ticket.began for ticket in self.accepted), default=0.0)
        usual = sum(self._seconds) / len(self._seconds) if self._seconds else longest
        return (self.n_queued + 1) * usual / slots

    async def accept(
        self,
        prompt: Prompt,
        settings: Settings,
        deadline_s: float,
        *,
        wants_steps: bool,
        rendering: Rendering = AS_USUAL,
        grammar: Grammar | None = None,
        fills_context: bool = False,
    ) -> Ticket:
        """Reserve a place, tokenize the prompt, compile the grammar and submit them to the engine.

        fills_context: the answer may be as long as context and `server.max_new_tokens` allow. Raises Overloaded if the
        queue is full, Unready while the engine is not available, DeadlineError, and UsageError for a prompt that cannot
        be encoded, and for a grammar that cannot be compiled in COMPILE_S seconds.
        """
        ticket = self._reserve(settings, deadline_s, wants_steps=wants_steps)
        try:
            compiled = None if grammar is None else await self._compiled(grammar)
            ids = await self._in_encoder(lambda engine: engine.encode(prompt, None, rendering), deadline_s)
        except BaseException:
            self.accepted.discard(ticket)
            raise
        if fills_context:
            settings = fill_context(len(ids), settings, self.opened().context)
            most = self.config.server.max_new_tokens
            settings = settings._replace(max_new_tokens=min(settings.max_new_tokens, most or settings.max_new_tokens))
        ticket.request = Request(ids, settings, compiled)
        self._inbox.put(("submit", ticket))
        return ticket

    async def aside(self, work: Callable[[Engine], T]) -> T:
        """Run `work(engine)`, which only uses the tokenizer, in the encoder's thread. It takes a place meanwhile.

        Raises what `accept` does.
        """
        deadline_s = self.config.server.deadline_s
        ticket = self._reserve(self.opened().settings(self.config), deadline_s, wants_steps=False)
        try:
            return await self._in_encoder(work, deadline_s)
        finally:
            self.accepted.discard(ticket)

    def _reserve(self, settings: Settings, deadline_s: float, *, wants_steps: bool) -> Ticket:
        """Take a place among those that run or wait. Raises Overloaded if there is none."""
        engine = self.opened()
        if len(self.accepted) >= engine.slots + self.config.server.queue:
            line = f"{len(self.accepted)} requests are waiting or running (server.queue); try again later"
            raise Overloaded(line, self.wait_s())
        ticket = Ticket(settings, deadline_s, wants_steps=wants_steps)
        self.accepted.add(ticket)
        return ticket

    async def _in_encoder(self, work: Callable[[Engine], T], deadline_s: float) -> T:
        # A long prompt takes time to tokenize, so that runs in its own thread. Its queue is bounded by the places.
        working = self.loop.run_in_executor(self._encoder, work, self.opened())
        try:
            await asyncio.wait({working}, timeout=deadline_s)
            if not working.done():
                raise DeadlineError("the deadline passed before the prompt was tokenized")
            self.opened()  # the server may have stopped meanwhile
            return working.result()
        finally:
            working.cancel()

    async def _compiled(self, grammar: Grammar) -> CompiledGrammar:
        compiling = self.loop.run_in_executor(self._compiler, self.opened().compile, grammar)
        try:
            await asyncio.wait({compiling}, timeout=COMPILE_S)
            if not compiling.done():
                raise UsageError(
                    f"compiling the schema takes longer than {COMPILE_S:g} seconds; make it smaller or simpler"
                )
            return compiling.result()
        finally:
            compiling.cancel()

    def drop(self, ticket: Ticket) -> None:
        """Cancel a request; its slot is free after the current pass. Does nothing for a finished request."""
        if ticket in self.accepted:
            self.accepted.discard(ticket)
            self._inbox.put(("drop", ticket))

    async def events(self, ticket: Ticket) -> AsyncIterator[list[Event]]:
        """Yield the events of an accepted request until its Completion, in batches of all that arrived meanwhile.

        Raises the HildaError that ended the request. Closing the generator early drops the request.
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
                self._seconds.append(what.stats.seconds)
                self.meters.completed(what.stats, len(what.token_ids))
            if isinstance(what, (Completion, HildaError)):
                self.accepted.discard(ticket)

    def _end(self, error: HildaError) -> None:
        """End all accepted requests after the engine has stopped. Runs in the event loop, so that none is missed."""
        self._deliver([(ticket, error) for ticket in self.accepted])
        if self.failure is not None:
            self.on_failure()

    # --- Called in the engine's thread

    def _run(self) -> None:
        try:
            engine = self.open_engine(self.config)
            settings = engine.settings(self.config)._replace(max_new_tokens=1)
            engine.generate(Request(engine.encode("Hello"), settings))  # ready means that it has answered once
        except Exception as error:  # noqa: BLE001  (loading may fail in any way)
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
        except Exception as error:  # noqa: BLE001  (an engine that cannot cancel its requests is unusable)
            end = self.failure = _failure(error)
        self.state = "stopped"
        self._call(self._end, end)
        engine.close()

    def _serve(self, steps: Steps) -> None:
        """Run passes until told to stop. If a pass fails, the running requests fail; later requests are tried again."""
        while True:
            try:
                if not self._receive(steps):
                    return
                self._run_pass(steps)
            except Exception as error:  # noqa: BLE001
                self.state = "failing"
                self._fail(steps, _failure(error))

    def _receive(self, steps: Steps) -> bool:
        """Submit new requests and cancel dropped ones; wait while no request is running. False: stop."""
        while not self._running or not self._inbox.empty():
            what, ticket = self._next()
            if ticket is None:
                return False
            if what == "drop":
                if self._running.pop(ticket.handle, None) is not None:
                    steps.cancel(ticket.handle)
                continue
            try:
                ticket.handle = steps.submit(ticket.request)
            except Exception as error:  # noqa: BLE001  (only this request fails)
                self._tell([(ticket, _failure(error))])
            else:
                self._running[ticket.handle] = ticket
        return True

    def _next(self) -> tuple[str, Ticket | None]:
        """Return the next message. If none comes for REST_S seconds, the engine frees memory meanwhile."""
        try:
            return self._inbox.get(timeout=REST_S)
        except queue.Empty:
            assert self.engine is not None
            self.engine.rest()
            return self._inbox.get()

    def _run_pass(self, steps: Steps) -> None:
        """Run one pass over all running requests and deliver its events."""
        assert self.engine is not None
        n_running = min(self.engine.slots, len(self._running))  # counted before the pass, which may end some requests
        happened = steps.step()
        self.state = "ready"
        self.meters.batch.observe(n_running)
        mine = [(self._running[handle], what) for handle, what in happened if handle in self._running]
        # Waking the event loop costs more than the decode rule of a pass: skip steps that nobody reads.
        news = [(ticket, what) for ticket, what in mine if ticket.wants_steps or not isinstance(what, Step)]
        for ticket, what in news:
            if isinstance(what, (Completion, HildaError)):
                del self._running[ticket.handle]
        now = time.monotonic()
        late = [ticket for ticket in self._running.values() if now > ticket.deadline]
        news += [(ticket, DeadlineError("the deadline passed before the answer was complete")) for ticket in late]
        self._tell(news)
        for ticket in late:
            del self._running[ticket.handle]
            steps.cancel(ticket.handle)

    def _fail(self, steps: Steps, error: HildaError) -> None:
        """End all running requests with an error. Deliver it first: cancelling may fail too."""
        failed, self._running = self._running, {}
        self._tell([(ticket, error) for ticket in failed.values()])
        for handle in failed:
            steps.cancel(handle)

    def _tell(self, news: list[tuple[Ticket, Event | HildaError]]) -> None:
        if news:
            self._call(self._deliver, news)

    def _call(self, what: Callable[..., object], *given: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(what, *given)


def _failure(error: Exception) -> HildaError:
    """Turn any error into one line for the client. An unexpected error's traceback goes to the log."""
    if isinstance(error, HildaError):
        return error
    traceback.print_exception(error)
    return ModelError(f"the engine failed: {type(error).__name__}; see the server's log")
