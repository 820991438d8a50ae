"""The protocol between engines and their callers: request, completion and the methods of every engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, runtime_checkable

from hildanext.config import Config, Mode
from hildanext.decoding.events import Finished, Stats, Step, TokenLogprob
from hildanext.decoding.grammar import Grammar
from hildanext.decoding.settings import Settings
from hildanext.errors import HildaError, UsageError

if TYPE_CHECKING:  # imports torch, which the dummy does not need
    from hildanext.decoding.constraint import CompiledGrammar

Prompt = str | list[int] | list[dict[str, Any]]  # a text, its token ids, or chat messages


class Rendering(NamedTuple):
    """How a prompt becomes token ids, by the names of vLLM's API."""

    add_generation_prompt: bool = True  # messages: end with the beginning of an answer
    continue_final_message: bool = False  # messages: the last one, the assistant's, is continued
    add_special_tokens: bool = True  # text: begin with what the tokenizer puts before a text
    tools: list[dict[str, Any]] | None = None  # messages: functions that the model may call, in OpenAI's format


AS_USUAL = Rendering()


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, its decoding settings, and what the completion must match (see `Engine.compile`)."""

    prompt_ids: list[int]
    settings: Settings
    grammar: CompiledGrammar | None = None
    draft: list[int] | None = None  # a completion to be repaired: its tokens stand in the blocks in place of masks


@dataclass(frozen=True)
class Completion:
    """The answer to a request."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" (end of text) or "length"
    engine: str
    engine_reasons: dict[str, str]  # the engines that were passed over, and why
    mode: str
    tau_mask: float
    tau_edit: float | None
    stats: Stats
    runtime: str | None = None  # the runtime under the transformers engine
    ignored: list[str] = field(default_factory=list)  # requested settings that the engine does not support
    logprobs: list[TokenLogprob] | None = None  # of each token, where the request asks for them

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Event = Step | Finished | Completion


class Engine(Protocol):
    """An engine answers requests. It is used from one thread at a time."""

    @property
    def name(self) -> str: ...

    @property
    def slots(self) -> int:
        """The number of requests decoded side by side. Halved if memory runs out."""
        ...

    reasons: dict[str, str]  # why the engines before this one in `engine.order` cannot serve
    trained_block: int | None  # block size that the model was trained with
    device: str | None  # device of the model
    dtype: str | None  # dtype of the computation
    policy: dict[str, object] | None  # `Policy.as_dict`; None: the engine decides by itself
    mask_token_id: int | None  # the mask token in the tokens of a Step
    eos_token_ids: tuple[int, ...]  # any of them ends a completion
    modes: tuple[Mode, ...]  # that its model can decode in; the first is the default
    has_base: bool  # it also gives its base's own text token by token: EXACT with one row
    context: int | None  # most tokens of prompt and completion together; None: no limit

    @staticmethod
    def can_serve(config: Config) -> str | None:
        """The reason why this engine cannot serve the model on this machine, or None if it can. Loads nothing."""
        ...

    def encode(self, prompt: Prompt, known: list[int] | None = None, rendering: Rendering = AS_USUAL) -> list[int]:
        """Token ids of a prompt. `known`: ids of its beginning, reused if they fit."""
        ...

    def settings(self, config: Config) -> Settings: ...

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Prepare a grammar for `Request.grammar`. Any thread may call it.

        Raises UsageError for what the grammar engine does not support, and if this engine has no constrained decoding.
        """
        ...

    def decode_tokens(self, token_ids: list[int]) -> str:
        """The text of a completion: without special tokens."""
        ...

    def detokenize(self, token_ids: list[int]) -> str:
        """The text of tokens, special ones included. Raises UsageError for an id without a token."""
        ...

    def generate(self, request: Request) -> Completion: ...

    def stream(self, request: Request) -> Iterator[Event]:
        """The request's events. The last one is its Completion."""
        ...

    def rest(self) -> None:
        """Free memory that is not needed while nothing runs. Called when no request has come for some seconds."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Steps(Protocol):
    """Decodes several requests together. The handle from `submit` identifies a request in `cancel` and `step`."""

    def submit(self, request: Request) -> Any:
        """Queue a request. Raises UsageError if it is invalid or too long."""
        ...

    def cancel(self, handle: Any) -> None: ...

    def step(self) -> list[tuple[Any, Event | HildaError]]:
        """Run one pass. Returns (handle, event) pairs.

        A request's last event is its Completion or the error that ended it.
        """
        ...


class OneByOne:
    """`Steps` for an engine that answers one request at a time. A step is the next event of the oldest request."""

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
            event: Event | HildaError = next(events)
        except HildaError as error:
            event = error
        if isinstance(event, (Completion, HildaError)):
            del self.waiting[handle]
        return [(handle, event)]


def as_steps(engine: Engine) -> Steps:
    return engine if isinstance(engine, Steps) else OneByOne(engine)


def last_completion(events: Iterator[Event]) -> Completion:
    """Run a stream to its end and return the Completion."""
    for event in events:
        if isinstance(event, Completion):
            return event
    raise RuntimeError("an engine's stream ended without a completion")


def refuse_grammar(engine: str) -> NoReturn:
    """Raise the UsageError of `compile` in an engine without constrained decoding."""
    raise UsageError(f"the engine '{engine}' has no structured output; use 'transformers' (engine.order)")
