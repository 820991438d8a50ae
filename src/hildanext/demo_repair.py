"""The second model of `demo`: it inserts and deletes, and repairs stories in which one word was dropped or doubled."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from hildanext.config import Config, load_config
from hildanext.data.synthetic import Faulty, faulty_stories, instruction
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.events import Step
from hildanext.decoding.settings import Settings
from hildanext.terminal.cells import Cell, CellTracker, as_line

READY = Path(__file__).parent / "configs" / "demo-repair.json"
N_FAULTY = 20
AROUND = 5  # cells that are shown before and behind a change
MOVED = re.compile(r"\+_| -\S+- ")  # the marks of an insertion and of a deletion


def repair_config(config: Config) -> Config:
    """The configuration of the second model. config: the first one's, of which it takes data, base, device and seed."""
    ready = load_config(READY, [])
    kept = {name: getattr(config.model, name) for name in ("base", "device", "dtype")}
    model, train = ready.model.model_copy(update=kept), ready.train.model_copy(update={"seed": config.train.seed})
    return ready.model_copy(update={"paths": config.paths, "data": config.data, "model": model, "train": train})


def repair_request(engine: TransformersEngine, settings: Settings, faulty: Faulty) -> Request:
    """Ask for the repair of a story. It is filled up with the end of text to whole blocks, as rows of `sft` are."""
    prompt = engine.encode([{"role": "user", "content": instruction(faulty.slots)}])
    end = engine.eos_token_ids[0]
    draft = [*engine.tokenizer(faulty.faulty, add_special_tokens=False)["input_ids"], end]
    return Request(prompt, settings, draft=draft + [end] * (-(len(prompt) + len(draft)) % settings.block_size))


def is_repaired(done: Completion, faulty: Faulty) -> bool:
    """Whether the answer is the story before the fault."""
    return done.text.strip() == faulty.story


def measure_repairs(engine: TransformersEngine, settings: Settings) -> tuple[dict[str, Any], str]:
    """Repair N_FAULTY new stories: entries of the report, and the passes of one repair as text.

    That is the first one that succeeded with an insertion or a deletion; if none did, the first one that succeeded.
    """
    stories = faulty_stories(N_FAULTY, seed=7)
    requests = [repair_request(engine, settings, faulty) for faulty in stories]
    answers = engine.generate_batch(requests)
    repaired = [is_repaired(done, faulty) for done, faulty in zip(answers, stories, strict=True)]
    of_kind = {
        kind: sum(right for right, faulty in zip(repaired, stories, strict=True) if faulty.kind == kind)
        for kind in ("dropped", "doubled")
    }
    candidates = [i for i in range(N_FAULTY) if repaired[i]] or [0]
    decoded = ((i, show_repair(engine, requests[i])) for i in candidates)  # only as many as are looked at
    first = next(decoded)
    moved = ((i, passes) for i, passes in itertools.chain([first], decoded) if MOVED.search(passes))
    shown, passes = next(moved, first)
    text = f"  before:  {stories[shown].faulty}\n{passes}\n  after:   {answers[shown].text.strip()}"
    return {"stories": N_FAULTY, "repaired": sum(repaired)} | of_kind, text


def show_repair(engine: TransformersEngine, request: Request, most: int = 12) -> str:
    """The first passes of a repair that change the answer, a line each: words around the change, marked as in `as_line`."""
    tracker, lines = CellTracker(engine, request), list[str]()
    for event in engine.stream(request):
        if isinstance(event, Step):
            cells = [cell for cell in tracker.cells(event) if cell.kind not in ("prompt", "cut")]
            changed = [i for i, cell in enumerate(cells) if is_changed(cell)]
            if changed:
                near = cells[max(0, changed[0] - AROUND) : changed[-1] + AROUND + 1]
                lines.append(f"  pass {event.step + 1}:  ... {as_line(event, near).partition(':')[2].strip()} ...")
    return "\n".join(lines[:most])


def is_changed(cell: Cell) -> bool:
    """Whether the pass changed this cell, or dropped a token before it."""
    return (
        cell.kind in ("drafted", "inserted") or (cell.kind == "edited" and cell.strength == 1.0) or bool(cell.dropped)
    )
