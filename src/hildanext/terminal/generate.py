"""The `generate` command: complete one prompt, as text streamed block by block or as one JSON object."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.decoding.engines import Completion, Engine, Request, open_engine, say_passed_over
from hildanext.decoding.events import Finished, Step
from hildanext.errors import UsageError
from hildanext.progress import say
from hildanext.terminal.cells import CellTracker, write_trace
from hildanext.terminal.console import checked, read_input, write_text
from hildanext.terminal.picture import Decode, check_format, draw


def read_prompt(prompt: str) -> str:
    """Return the prompt, read from stdin if it is '-'. Raises UsageError if it is empty or not UTF-8."""
    text = read_input() if prompt == "-" else checked(prompt)
    if not text.strip():
        raise UsageError("the prompt is empty; give some text")
    return text


def generate(
    config: Config, prompt: str, *, raw: bool, trace: str | None, live: bool, picture: str | None = None
) -> dict[str, Any]:
    """Complete a prompt and return the completion's fields.

    raw: continue the text without the chat template. live: stream the text if stdout is a terminal. trace: file for the
    passes as JSON lines. picture: file for a drawing of the passes.
    """
    text = read_prompt(prompt)
    if picture is not None:
        check_format(picture)
    engine = open_engine(config)
    say_passed_over(engine)
    try:
        request = Request(engine.encode(text if raw else [{"role": "user", "content": text}]), engine.settings(config))
        stream_text = live and sys.stdout.isatty()
        completion, steps = _consume(engine, request, stream_text)
    finally:
        engine.close()
    if picture is not None:
        _draw(engine, request, text, completion, steps, Path(picture))
    if trace is not None:
        write_trace(Path(trace), steps)
    if completion.engine == "dummy":
        say("the dummy engine answered: no model ran")
    stats = completion.stats
    if live:
        say(f"[{completion.engine}, {cost_line(completion)}, {stats.tokens_per_second:.1f} tokens/s]")
    return completion.as_dict() | {"stdout": "" if stream_text else completion.text}


def cost_line(completion: Completion) -> str:
    """The cost of a completion in words: its mode, tokens, forwards and drafts."""
    stats = completion.stats
    return (
        f"{completion.mode}: {len(completion.token_ids)} tokens, {stats.forwards} forwards, "
        f"{stats.tokens_per_forward:.2f} tokens per forward, {stats.changes}"
        f"{'' if stats.seed is None else f', seed {stats.seed}'}"
    )


def _draw(engine: Engine, request: Request, prompt: str, completion: Completion, steps: list[Step], path: Path) -> None:
    if not steps:
        say(f"{path} not drawn: the {engine.name} engine reports no passes")
        return
    tracker = CellTracker(engine, request)
    passes = [(step, tracker.cells(step)) for step in steps]
    draw(Decode(prompt, passes, cost_line(completion), tracker.verifies), path)


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
