"""What each pass of a decode did to each position, as cells for drawing, as a line of text and as a trace file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from hildanext.decoding.engines import Engine, Request
from hildanext.decoding.events import Step
from hildanext.files import atomic_open
from hildanext.model.text_stream import complete_text
from hildanext.terminal.console import printable

FADE = 3  # passes for which an edit stays visible

# inserted: a mask that the pass put before a token. deleted: what the pass dropped, see `with_deleted`. end: the
# end-of-text token. cut: a token after it or beyond max_new_tokens, which is not part of the answer.
Kind = Literal["prompt", "mask", "drafted", "edited", "inserted", "deleted", "settled", "end", "cut"]


class Cell(NamedTuple):
    """One position. `strength`: the confidence of a draft; for an edit 1 in its own pass, less in later passes."""

    position: int
    text: str
    kind: Kind
    strength: float
    dropped: str = ""  # the text that the pass dropped before it


class CellTracker:
    """Turns the passes of one answer into cells. Keeps the age of edits between passes."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine = engine
        self.n_prompt = len(request.prompt_ids)
        self.limit = self.n_prompt + request.settings.max_new_tokens
        self.verifies = request.settings.tau_accept is not None  # drafts; each pass then shows what it added
        self.edited: dict[int, int] = {}  # position -> passes since its last edit

    def cells(self, step: Step) -> list[Cell]:
        """Return the cells of the positions that a pass shows, in order."""
        self.edited = {position: age + 1 for position, age in self.edited.items() if age + 1 < FADE}
        self.edited |= {step.start + place: 0 for place in step.edited}
        texts = token_texts(self.engine.decode_tokens, step.tokens, self.engine.mask_token_id)
        cells, is_cut = [], False
        for place, (token, text) in enumerate(zip(step.tokens, texts, strict=True)):
            position = step.start + place
            kind, strength = self._state(step, place, token)
            if position >= self.n_prompt:
                if is_cut or position >= self.limit:
                    kind = "cut"
                elif token in self.engine.eos_token_ids:
                    kind, is_cut = "end", True
            gone = [token for where, token in step.deleted if where == place and token != self.engine.mask_token_id]
            cells.append(Cell(position, text, kind, strength, self.engine.decode_tokens(gone) if gone else ""))
        return cells

    def _state(self, step: Step, place: int, token: int) -> tuple[Kind, float]:
        position = step.start + place
        if position < self.n_prompt:
            return "prompt", 1.0
        if token == self.engine.mask_token_id:
            return "inserted" if place in step.inserted else "mask", 1.0
        if place in step.drafted:
            return "drafted", step.confidence[place] or 0.0
        if position in self.edited:
            return "edited", 1 - self.edited[position] / FADE
        return "settled", 1.0


def with_deleted(cells: Iterable[Cell]) -> Iterator[Cell]:
    """The cells, and before each the text that was dropped there as a cell of its own."""
    for cell in cells:
        if cell.dropped:
            yield Cell(cell.position, cell.dropped, "deleted", 1.0)
        yield cell


def token_texts(decode_tokens: Callable[[list[int]], str], tokens: list[int], mask_token_id: int | None) -> list[str]:
    """Return the text that each token adds to the tokens before it; '' for a mask and for an incomplete character."""
    texts: list[str] = []
    run: list[int] = []
    shown = ""
    for token in tokens:
        if token == mask_token_id:
            run, shown = [], ""
            texts.append("")
            continue
        run.append(token)
        text = complete_text(decode_tokens, run)
        texts.append(text[len(shown) :] if text.startswith(shown) else "")
        shown = text if text.startswith(shown) else shown
    return texts


def as_line(step: Step, cells: list[Cell]) -> str:
    """Format a pass as text: `_` is a mask, [word] was drafted and {word} edited in this pass, +_ is a mask that it
    inserted and -word- a token that it deleted; ∎ ends the text."""
    forms = {"drafted": "[{}]", "inserted": "+{}", "deleted": "-{}-"}
    words = []
    for cell in (cell for cell in with_deleted(cells) if cell.kind != "cut"):
        word = printable(cell.text).strip() or {"mask": "_", "inserted": "_", "end": "∎"}.get(cell.kind, "")
        fresh = cell.kind == "edited" and cell.strength == 1.0
        words.append("{" + word + "}" if fresh else forms.get(cell.kind, "{}").format(word))
    return f"block {step.block} pass {step.step + 1}:  {' '.join(word for word in words if word)}"


def write_trace(path: Path, steps: list[Step]) -> None:
    """Write the passes of an answer as JSON lines, one object with the fields of `Step` per pass, atomically."""
    with atomic_open(path) as file:
        file.writelines(json.dumps(step._asdict()) + "\n" for step in steps)
