"""A completion as Python and notebooks show it: its text, its cost, and with its passes a picture of them."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from pathlib import Path
from typing import Any

from hildanext.decoding import engines
from hildanext.decoding.engines import Engine, Request
from hildanext.decoding.events import Step
from hildanext.errors import UsageError
from hildanext.terminal.cells import CellTracker
from hildanext.terminal.generate import cost_line
from hildanext.terminal.picture import Decode, draw, paint, stepped

# A picture has a row for each pass. One with more is not drawn by itself: it would take hundreds of megabytes.
MOST_ROWS_SHOWN = 128


@dataclass(frozen=True)
class Completion(engines.Completion):
    """The answer to a prompt. `print` shows its text; a notebook shows a picture of its passes, if they were kept."""

    steps: list[Step] | None = field(default=None, repr=False)  # its passes, if asked for
    decode: Decode | None = field(default=None, repr=False)  # what a picture of them shows

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """All fields that JSON can hold, as in the answer of POST /generate; `steps` as objects, null if not kept."""
        found = asdict(replace(self, steps=None, decode=None))
        del found["decode"]
        return found | {"steps": None if self.steps is None else [step._asdict() for step in self.steps]}

    def picture(self, path: str | Path) -> None:
        """Draw the passes into a file: a row for each (.png, .svg) or an animation (.gif).

        Raises UsageError for another file name and if no passes were kept.
        """
        draw(self._drawable(), Path(path))

    def _drawable(self) -> Decode:
        if self.decode is None:
            raise UsageError("this completion has no passes to draw; ask for them with generate(..., steps=True)")
        return self.decode

    @property
    def _is_shown_as_picture(self) -> bool:
        return self.decode is not None and len(self.decode.passes) <= MOST_ROWS_SHOWN

    def _repr_png_(self) -> bytes | None:
        if not self._is_shown_as_picture:
            return None
        file = io.BytesIO()
        paint(stepped(self._drawable())).save(file, "PNG", optimize=True)
        return file.getvalue()

    def _repr_html_(self) -> str:
        """The text and its cost, and the picture, if there is one: notebooks prefer HTML to an image."""
        parts = [f'<div style="white-space: pre-wrap">{escape(self.text)}</div>']
        if (png := self._repr_png_()) is not None:
            image = base64.b64encode(png).decode()
            parts = [f'<img style="max-width: 100%" alt="{escape(self.text)}" src="data:image/png;base64,{image}">']
        return "\n".join([*parts, f"<small>{escape(cost_line(self))}</small>"])


def shown_completion(
    engine: Engine, prompt: str, request: Request, completion: engines.Completion, steps: list[Step] | None
) -> Completion:
    """The engine's completion with its passes (None: not kept). prompt: the text above the picture."""
    decode = None
    if steps:  # an engine may report no passes
        tracker = CellTracker(engine, request)
        passes = [(step, tracker.cells(step)) for step in steps]
        decode = Decode(prompt, passes, cost_line(completion), tracker.verifies)
    plain = {item.name: getattr(completion, item.name) for item in fields(engines.Completion)}
    return Completion(**plain, steps=steps, decode=decode)
