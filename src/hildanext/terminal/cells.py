"""A decode to look at: after each pass, what stands at each position of the block and how it came there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from hildanext.decoding.engines import Engine, Request
from hildanext.decoding.events import Step
from hildanext.terminal.console import printable

FADE = 3  # passes in which an edit can still be told

# end: the end-of-text token; cut: what stands behind it, or beyond the budget, and is no part of the answer.
Kind = Literal["prompt", "mask", "drafted", "edited", "settled", "end", "cut"]


class Cell(NamedTuple):
    """One position. `strength`: of a draft its confidence, of an edit 1 in its pass and less in the next ones."""

    position: int
    text: str
    kind: Kind
    strength: float


class Settling:
    """Follows the passes of one answer."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine = engine
        self.n_prompt = len(request.prompt_ids)
        self.limit = self.n_prompt + request.settings.max_new_tokens
        self.edited: dict[int, int] = {}  # position -> passes since its last edit

    def cells(self, step: Step) -> list[Cell]:
        """The positions of a pass, in order."""
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
                elif token == self.engine.eos_token_id:
                    kind, is_cut = "end", True
            cells.append(Cell(position, text, kind, strength))
        return cells

    def _state(self, step: Step, place: int, token: int) -> tuple[Kind, float]:
        position = step.start + place
        if position < self.n_prompt:
            return "prompt", 1.0
        if token == self.engine.mask_token_id:
            return "mask", 1.0
        if place in step.drafted:
            return "drafted", step.confidence[place] or 0.0
        if position in self.edited:
            return "edited", 1 - self.edited[position] / FADE
        return "settled", 1.0


def token_texts(decode_tokens: Callable[[list[int]], str], tokens: list[int], mask_token_id: int | None) -> list[str]:
    """The piece of text that each token adds to those before it; '' for masks and for the first bytes of a character."""
    texts: list[str] = []
    run: list[int] = []
    shown = ""
    for token in tokens:
        if token == mask_token_id:
            run, shown = [], ""
            texts.append("")
            continue
        run.append(token)
        text = decode_tokens(run).removesuffix("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(shown) :] if text.startswith(shown) else "")
        shown = text if text.startswith(shown) else shown
    return texts


def as_line(step: Step, cells: list[Cell]) -> str:
    """A pass in plain text: `_` is a mask, [word] was drafted in it, {word} edited, ∎ is the end."""
    words = []
    for cell in (cell for cell in cells if cell.kind != "cut"):
        word = printable(cell.text).strip() or {"mask": "_", "end": "∎"}.get(cell.kind, "")
        fresh = cell.kind == "edited" and cell.strength == 1.0
        words.append(f"[{word}]" if cell.kind == "drafted" else f"{{{word}}}" if fresh else word)
    return f"block {step.block} pass {step.step + 1}:  {' '.join(word for word in words if word)}"
