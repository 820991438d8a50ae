"""An engine without a model, for demonstrations and tests: it echoes the prompt and says so in every completion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from hildanext.config import Config, EngineName
from hildanext.decoding.engines.protocol import (
    AS_USUAL,
    Completion,
    Event,
    Prompt,
    Rendering,
    Request,
    Stats,
    last_completion,
    refuse_grammar,
)
from hildanext.decoding.events import Finished
from hildanext.decoding.grammar import Grammar
from hildanext.decoding.settings import MODES_OF, Settings, check_ids, check_request, resolve

NOTICE = "[dummy engine, no model ran] "


class DummyEngine:
    """Its tokens are bytes."""

    name: EngineName = "dummy"
    modes = MODES_OF["blocks"]
    has_base = False
    trained_block: int | None = None
    device: str | None = None
    dtype: str | None = None
    policy: dict[str, object] | None = None
    slots = 1
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    context: int | None = None

    def __init__(self, config: Config, reasons: dict[str, str]) -> None:
        self.reasons = reasons

    @staticmethod
    def can_serve(config: Config) -> str | None:
        return None

    def encode(self, prompt: Prompt, known: list[int] | None = None, rendering: Rendering = AS_USUAL) -> list[int]:
        if isinstance(prompt, str):
            return list(prompt.encode())
        last = prompt[-1] if prompt else 0
        if isinstance(last, dict):
            return list(last["content"].encode())
        return [token for token in prompt if isinstance(token, int)]

    def settings(self, config: Config) -> Settings:
        return resolve(config.decode, 32)

    def compile(self, grammar: Grammar) -> NoReturn:
        refuse_grammar(self.name)

    def decode_tokens(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def detokenize(self, token_ids: list[int]) -> str:
        check_ids("tokens", token_ids, 256)
        return self.decode_tokens(token_ids)

    def generate(self, request: Request) -> Completion:
        return last_completion(self.stream(request))

    def stream(self, request: Request) -> Iterator[Event]:
        settings = request.settings
        check_request(request.prompt_ids, settings, None)
        check_ids("prompt", request.prompt_ids, 256)
        everything = list(NOTICE.encode()) + request.prompt_ids
        new = everything[: settings.max_new_tokens]
        text = self.decode_tokens(everything)  # not cut: a short answer must say so, too
        yield Finished(0, new, text)
        yield Completion(
            text=text,
            token_ids=new,
            finish_reason="stop" if len(new) == len(everything) else "length",
            engine=self.name,
            engine_reasons=self.reasons,
            mode=settings.mode,
            tau_mask=settings.tau_mask,
            tau_edit=settings.tau_edit,
            stats=Stats(0, 0, 0.0, [], 0, 0, 0.0, 0.0),
            ignored=["every setting: no model ran"],
        )

    def rest(self) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Nothing to close."""
