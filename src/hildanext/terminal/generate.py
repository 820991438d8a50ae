"""The `generate` command: one prompt, text streamed block by block, or one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.decoding.engines import Completion, Engine, Request, open_engine
from hildanext.decoding.events import Finished, Step
from hildanext.errors import UsageError
from hildanext.files import atomic_open
from hildanext.progress import say
from hildanext.terminal.cells import Settling
from hildanext.terminal.console import checked, read_input, write_text
from hildanext.terminal.picture import Decode, check_format, draw


def read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin for '-'. Raises UsageError for an empty one, and for one that is not UTF-8."""
    text = read_input() if prompt == "-" else checked(prompt)
    if not text.strip():
        raise UsageError("the prompt is empty; give some text")
    return text


def generate(
    config: Config, prompt: str, *, raw: bool, trace: str | None, live: bool, picture: str | None = None
) -> dict[str, Any]:
    """Complete a prompt. live=True streams text to stdout on a terminal; the result holds the completion's fields."""
    text = read_prompt(prompt)
    if picture is not None:
        check_format(picture)
    engine = open_engine(config)
    for name, reason in engine.reasons.items():
        say(f"engine {name} passed over: {reason}")
    try:
        request = Request(engine.encode(text if raw else [{"role": "user", "content": text}]), engine.settings(config))
        stream_text = live and sys.stdout.isatty()
        completion, steps = _consume(engine, request, stream_text)
    finally:
        engine.close()
    if picture is not None:
        _draw(engine, request, text, completion, steps, Path(picture))
    if trace is not None:
        with atomic_open(Path(trace)) as file:
            file.writelines(json.dumps(step._asdict()) + "\n" for step in steps)
    if completion.engine == "dummy":
        say("the dummy engine answered: no model ran")
    stats = completion.stats
    if live:
        say(f"[{completion.engine}, {_cost(completion)}, {stats.tokens_per_second:.1f} tokens/s]")
    return completion.as_dict() | {"stdout": "" if stream_text else completion.text}


def _cost(completion: Completion) -> str:
    stats = completion.stats
    return (
        f"{completion.mode}: {len(completion.token_ids)} tokens, {stats.forwards} forwards, "
        f"{stats.tokens_per_forward:.2f} tokens per forward, {stats.edits} edits"
    )


def _draw(engine: Engine, request: Request, prompt: str, completion: Completion, steps: list[Step], path: Path) -> None:
    if not steps:
        say(f"{path}: not drawn, the {engine.name} engine shows no passes")
        return
    settling = Settling(engine, request)
    draw(Decode(prompt, [(step, settling.cells(step)) for step in steps], _cost(completion)), path)


def _consume(engine: Engine, request: Request, stream_text: bool) -> tuple[Completion, list[Step]]:
    steps: list[Step] = []
    for event in engine.stream(request):
        if isinstance(event, Step):
            steps.append(event)
        elif isinstance(event, Finished):
            if stream_text:
                write_text(event.text)
        else:
            return event, steps
    raise RuntimeError("an engine's stream ended without a completion")
