"""What engines and their callers share: request, completion, and the protocol that every engine follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from hildanext.config import Config, EngineName
from hildanext.decode import Finished, Settings, Step


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

    name: EngineName
    reasons: dict[str, str]  # why the engines before this one cannot serve
    trained_block: int | None  # block size the model was trained for
    device: str | None  # where the model runs

    @staticmethod
    def can_serve(config: Config) -> str | None:
        """None, or the reason why not. Loads nothing."""
        ...

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]: ...

    def settings(self, config: Config) -> Settings: ...

    def decode_tokens(self, token_ids: list[int]) -> str: ...

    def generate(self, request: Request) -> Completion: ...

    def stream(self, request: Request) -> Iterator[Event]: ...

    def close(self) -> None: ...


def last_completion(events: Iterator[Event]) -> Completion:
    """Run a stream to its end."""
    for event in events:
        if isinstance(event, Completion):
            return event
    raise RuntimeError("an engine's stream ended without a completion")
