"""Showing an answer during decoding: redrawn after every pass on a terminal, plain text elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hildanext.decoding.events import Finished, Step
from hildanext.progress import say
from hildanext.terminal.cells import Cell, CellTracker, as_line, with_deleted
from hildanext.terminal.console import printable, write_text

REDRAW_S = 1 / 30
MASK = " ▒▒▒"


def style_of(cell: Cell) -> str:
    """Return a cell's style, in colours of the terminal's own palette, which suit its background."""
    if cell.kind == "drafted":
        return "bold green" if cell.strength >= 0.9 else "green" if cell.strength >= 0.6 else "dim green"
    if cell.kind == "edited":
        return "bold magenta" if cell.strength == 1 else "magenta" if cell.strength > 0.5 else "dim magenta"
    grey = dict.fromkeys(("mask", "prompt", "end"), "bright_black")
    return (grey | {"inserted": "bold blue", "deleted": "red strike"}).get(cell.kind, "")


def draw_cells(cells: list[Cell]) -> Text:
    """Draw a block: masks as shades, drafts and edits in colour, without the cells that are not part of the answer."""
    text = Text()
    for cell in with_deleted(cells):
        if cell.kind in ("mask", "inserted"):
            text.append(MASK, style_of(cell))
        elif cell.kind not in ("cut", "prompt", "end"):
            text.append(printable(cell.text), style_of(cell))
    return text


def draw_line(step: Step, cells: list[Cell]) -> Text:
    """Draw a pass as one line of a trace: the whole block, with the prompt dimmed."""
    line = Text(f"block {step.block:3} pass {step.step + 1:2} ", "bright_black", overflow="fold")
    for cell in with_deleted(cells):
        if cell.kind in ("mask", "inserted"):
            line.append(" ▒", style_of(cell))
        elif cell.kind == "end":
            line.append(" ∎", style_of(cell))
        elif cell.kind != "cut":
            line.append(printable(cell.text).replace("\n", "⏎"), style_of(cell))
    return line


class PlainAnswer:
    """Writes text to stdout as blocks become final, and trace lines to stderr."""

    def __init__(self, tracker: CellTracker, *, trace: bool) -> None:
        self.tracker, self.trace = tracker, trace

    def __enter__(self) -> PlainAnswer:
        return self

    def show(self, event: Step | Finished) -> None:
        if isinstance(event, Finished):
            write_text(event.text)
        elif self.trace:
            say(as_line(event, self.tracker.cells(event)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        print(flush=True)


class LiveAnswer:
    """Prints final paragraphs; below them, redraws the unfinished paragraph and the current block in place.

    Where drafts are verified, the text keeps its colours: accepted drafts, corrections and the base's own words.
    """

    def __init__(self, console: Console, tracker: CellTracker, block_size: int, *, trace: bool) -> None:
        self.console, self.tracker, self.trace = console, tracker, trace
        self.upcoming = [Cell(0, "", "mask", 1.0)] * block_size
        self.paragraph, self.cells = Text(), self.upcoming
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.drawn = 0.0

    def __enter__(self) -> LiveAnswer:
        self.live.start()
        return self

    def show(self, event: Step | Finished) -> None:
        if isinstance(event, Finished):
            *final, self.paragraph = (self.paragraph + self._final(event.text)).split("\n", allow_blank=True)
            for paragraph in final:
                self.console.print(paragraph)
            self.cells = self.upcoming
        else:
            self.cells = self.tracker.cells(event)
            if self.trace:
                self.console.print(draw_line(event, self.cells))
        if time.monotonic() - self.drawn >= REDRAW_S:
            self._draw()

    def _final(self, text: str) -> Text:
        """Text that became certain: coloured if the last pass verified drafts and added exactly this text, else plain."""
        coloured = draw_cells(self.cells)
        return coloured if self.tracker.verifies and coloured.plain == printable(text) else Text(printable(text))

    def _draw(self) -> None:
        """Redraw the end of the unprinted text, as many lines as the window has."""
        text = self.paragraph + draw_cells(self.cells)
        lines = text.wrap(self.console, self.console.width)[-max(1, self.console.height - 2) :]
        self.live.update(Text("\n").join(lines), refresh=True)
        self.drawn = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.live.stop()
        self.console.print(self.paragraph)
