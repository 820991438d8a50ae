"""What engines and their callers share: request, completion, and the protocol that every engine follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

from hildanext.config import Config
from hildanext.decoding.events import Finished, Step
from hildanext.decoding.settings import Settings
from hildanext.errors import HildaError


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and how to decode it."""

    prompt_ids: list[int]
    settings: Settings


@dataclass(frozen=True)
class Stats:
    """What a completion cost. Every forward denoises, and stores what was not stored yet; chunks of a long prompt apart."""

    forwards: int
    prefill_forwards: int
    tokens_per_forward: float
    mask_ratio: list[float]  # masked share of the block before each pass
    drafts: int
    edits: int
    seconds: float
    tokens_per_second: float
    prefix_tokens: int = 0  # prompt tokens whose keys and values were stored already, from an earlier request


@dataclass(frozen=True)
class Completion:
    """An answer. `ignored`: settings asked for that this engine does not have."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" (end of text) or "length"
    engine: str
    engine_reasons: dict[str, str]
    mode: str
    tau_mask: float
    tau_edit: float | None
    stats: Stats
    runtime: str | None = None  # what ran the model under the engine, where there is a choice
    ignored: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Event = Step | Finished | Completion


class Engine(Protocol):
    """What every engine does. `stream` ends with the Completion."""

    @property
    def name(self) -> str: ...

    @property
    def slots(self) -> int:
        """Requests decoded side by side; fewer once memory ran out."""
        ...

    reasons: dict[str, str]  # why the engines before this one cannot serve
    trained_block: int | None  # block size the model was trained for
    device: str | None  # where the model runs
    dtype: str | None  # what it computes in
    policy: dict[str, object] | None  # what this machine gets and why (`Policy.as_dict`); None: the engine chooses
    mask_token_id: int | None  # what stands in a Step's tokens for text to be drafted
    eos_token_id: int | None
    context: int | None  # tokens of a prompt and its answer together; None: no limit

    @staticmethod
    def can_serve(config: Config) -> str | None:
        """None, or the reason why not. Loads nothing."""
        ...

    def encode(self, prompt: str | list[dict[str, str]], known: list[int] | None = None) -> list[int]:
        """Token ids of a prompt. `known`: ids of its beginning, kept as they are where they stand for the same text."""
        ...

    def settings(self, config: Config) -> Settings: ...

    def decode_tokens(self, token_ids: list[int]) -> str: ...

    def generate(self, request: Request) -> Completion: ...

    def stream(self, request: Request) -> Iterator[Event]: ...

    def close(self) -> None: ...


@runtime_checkable
class Steps(Protocol):
    """Requests under way, moved on together. What `submit` returns names a request in `cancel` and in the events."""

    def submit(self, request: Request) -> Any:
        """Raises UsageError for a request that cannot be answered."""
        ...

    def cancel(self, handle: Any) -> None: ...

    def step(self) -> list[tuple[Any, Event | HildaError]]:
        """What one pass brought; a request's last event is its Completion, or the error that ended it."""
        ...


class OneByOne:
    """`Steps` for an engine that answers one request at a time: a step is the next event of the oldest request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: dict[object, Iterator[Event]] = {}

    def submit(self, request: Request) -> object:
        handle = object()
        self.waiting[handle] = self.engine.stream(request)
        return handle

    def cancel(self, handle: object) -> None:
        self.waiting.pop(handle, None)

    def step(self) -> list[tuple[object, Event | HildaError]]:
        handle, events = next(iter(self.waiting.items()))
        try:
            what: Event | HildaError = next(events)
        except HildaError as error:
            what = error
        if isinstance(what, (Completion, HildaError)):
            del self.waiting[handle]
        return [(handle, what)]


def as_steps(engine: Engine) -> Steps:
    return engine if isinstance(engine, Steps) else OneByOne(engine)


def last_completion(events: Iterator[Event]) -> Completion:
    """Run a stream to its end."""
    for event in events:
        if isinstance(event, Completion):
            return event
    raise RuntimeError("an engine's stream ended without a completion")
