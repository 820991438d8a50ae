"""The picture of a decode against its trace: rows, texts, colours."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from hildanext.cli import main
from hildanext.config import Config
from hildanext.decoding import engines
from hildanext.decoding.engines import Request
from hildanext.decoding.events import Step
from hildanext.decoding.settings import Settings
from hildanext.terminal.cells import CellTracker, as_line
from hildanext.terminal.live import draw_line
from hildanext.terminal.picture import (
    COLUMNS,
    DELETE,
    DRAFT_HIGH,
    EDIT,
    FAINT,
    INSERT,
    PAPER,
    SHARP,
    Box,
    Decode,
    draw,
    frames,
    mix,
    paint,
    shown_text,
    stepped,
)

MASK, EOS = 99, 98
WORDS = ["Once", " upon", " a", " time", ".", " <The>", " extraordinarily", "\n", "é", " b"]


def scripted() -> tuple[Decode, list[Step]]:
    """Two blocks of four behind a prompt of two tokens: drafts, an edit that fades, an end with something behind it."""
    engine: Any = SimpleNamespace(
        mask_token_id=MASK, eos_token_ids=(EOS,), decode_tokens=lambda ids: "".join(WORDS[i] for i in ids if i < 90)
    )
    request = Request([1, 2], Settings("S_MODE", 0.5, 0.0, 16, 4, 20, 0.0, 0))
    steps = [
        Step(0, 0, [1, 2, 0, MASK], [2], [], [None, None, 0.9, 0.2], 0.5, 0),
        Step(0, 1, [1, 2, 6, 3], [3], [2], [None, None, 0.9, 0.6], 0.25, 0),
        Step(0, 2, [1, 2, 6, 3], [], [], [None, None, 0.9, 0.6], 0.0, 0),
        Step(1, 0, [5, MASK, EOS, 9], [0, 2, 3], [], [1.0, 0.1, 0.7, 0.7], 1.0, 4),
        Step(1, 1, [5, 4, EOS, 9], [1], [], [1.0, 0.4, 0.7, 0.7], 0.25, 4),
    ]
    tracker = CellTracker(engine, request)
    return Decode("Tell & tell", [(step, tracker.cells(step)) for step in steps], "S_MODE: 5 tokens"), steps


def drawn(row: list[Box]) -> list[str]:
    return [box.text for box in row if box.width]


def test_a_row_is_a_pass_and_a_box_a_token():
    decode, steps = scripted()
    heading, *rows, cost = stepped(decode).rows
    assert len(rows) == len(steps)
    assert heading[0].text == "Tell & tell"
    assert [box.text for box in cost] == ["S_MODE: 5 tokens"]
    assert [drawn(row) for row in rows] == [
        ["upon", "a", "Once", ""],
        ["upon", "a", "extraordinarily", "time"],
        ["upon", "a", "extraordinarily", "time"],
        ["<The>", "", "∎"],  # what is behind the end is no part of the answer
        ["<The>", ".", "∎"],
    ]
    assert [row[0].text for row in rows if not row[0].width] == ["block  0", "block  1"]
    fills = [[box.fill for box in row if box.width] for row in rows]
    low = mix(fills[0][2], DRAFT_HIGH, 0.0)
    assert fills[0][:2] == [None, None]
    assert fills[0][3] == FAINT
    assert low not in (FAINT, DRAFT_HIGH)
    assert fills[1][2] == EDIT
    assert fills[2][2] == mix(PAPER, EDIT, 2 / 3)
    assert fills[3][0] == DRAFT_HIGH
    # Positions of a block lie below each other, and no box covers its neighbour.
    places = [[(box.x, box.width) for box in row if box.width] for row in rows]
    assert places[0] == places[1] == places[2]
    for row in places:
        assert all(x + width < following for (x, width), (following, _) in pairwise(row))


def test_a_frame_is_a_pass_and_one_more_the_finished_text():
    decode, steps = scripted()
    pages = list(frames(decode))
    assert len(pages) == len(steps) + 1
    texts = [" ".join(box.text for box in page.rows[1] if box.text) for page in pages]
    assert texts == [
        "Once",
        "extraordinarily time",
        "extraordinarily time",
        "extraordinarily time <The>",
        "extraordinarily time <The> .",
        "extraordinarily time <The> .",
    ]
    assert not any(box.fill for box in pages[-1].rows[1])
    assert [page.rows[2][0].text for page in pages][3:] == [
        "pass   4     4 tokens",
        "pass   5     5 tokens",
        "S_MODE: 5 tokens",
    ]
    assert len({(page.width, page.height) for page in pages}) == 1


def test_words_are_not_broken_between_lines():
    decode, _ = scripted()
    (step, cells), *_ = decode.passes
    words = [" " + "x" * 30, "y" * 10, " " + "z" * 30, "q" * 10, "\n", "end"]
    long = [cells[2]._replace(position=i, text=text, kind="settled") for i, text in enumerate(words)]
    boxes = list(frames(Decode("p", [(step._replace(start=0), long)], "")))[-1].rows[1]
    lines: dict[float, str] = {}
    for box in boxes:
        lines[box.y] = lines.get(box.y, "") + box.text
    assert list(lines.values()) == ["x" * 30 + "y" * 10, "z" * 30 + "q" * 10, "end"]
    assert all(len(line) <= COLUMNS for line in lines.values())


def test_what_is_painted_is_what_was_drawn(tmp_path: Path):
    decode, steps = scripted()
    drawing = stepped(decode)
    for kind in ("png", "svg", "gif"):
        draw(decode, tmp_path / f"x.{kind}")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (round(drawing.width * SHARP), round(drawing.height * SHARP))
        for box in (box for row in drawing.rows for box in row if box.fill):
            corner = (round((box.x + 3) * SHARP), round((box.y + 10) * SHARP))  # left of the text
            assert image.getpixel(corner) == box.fill
        ink = {color for _, color in image.getcolors(1 << 20)}
        assert {box.ink for row in drawing.rows for box in row if box.text} <= ink
    tree = ET.parse(tmp_path / "x.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    groups = tree.findall(f"{name}g")
    assert len(groups) == len(steps) + 2
    for group, row in zip(groups, drawing.rows, strict=True):
        assert [text.text for text in group.findall(f"{name}text")] == [box.text for box in row if box.text]
        assert len(group.findall(f"{name}rect")) == sum(box.fill is not None for box in row)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == len(steps) + 1
        first = paint(next(frames(decode)))
        assert image.size == first.size
        image.seek(0)
        box = next(box for box in next(frames(decode)).rows[1] if box.fill)
        found = image.convert("RGB").getpixel((round((box.x + 1) * SHARP), round((box.y + 10) * SHARP)))
        assert sum(abs(a - b) for a, b in zip(found, box.fill or PAPER, strict=True)) < 30  # one palette for all


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_command_draws_its_own_decode(converted: Config, tmp_path: Path, kind: str, capsys):
    trace, picture = tmp_path / "trace.jsonl", tmp_path / f"decode.{kind}"
    options = ["--model", converted.model.base, "--set", "model.dtype=float32", "--set", "decode.max_new_tokens=8"]
    assert main(["generate", "Once upon", *options, "--json", "--trace", str(trace), "--picture", str(picture)]) == 0
    answer = json.loads(capsys.readouterr().out)
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(steps) == answer["stats"]["forwards"]
    if kind == "svg":
        groups = ET.parse(picture).getroot().findall("{http://www.w3.org/2000/svg}g")
        assert len(groups) == len(steps) + 2
        assert f"8 tokens, {len(steps)} forwards" in "".join(groups[-1].itertext())
    else:
        with Image.open(picture) as image:
            assert image.height > len(steps) * 26 * SHARP


def test_no_picture_of_that_kind_or_of_an_engine_without_passes(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(engines, "_engine", lambda name: pytest.fail("loaded before the options were looked at"))
    assert main(["generate", "hi", "--picture", str(tmp_path / "x.jpg")]) == 2
    assert capsys.readouterr().err.endswith("x.jpg: the name of a picture file must end in .png, .svg, .gif\n")
    monkeypatch.undo()
    path = tmp_path / "x.png"
    assert main(["generate", "hi", "--set", 'engine.order=["dummy"]', "--picture", str(path)]) == 0
    assert f"{path} not drawn: the dummy engine reports no passes" in capsys.readouterr().err
    assert not path.exists()


def test_line_ends_are_shown_in_boxes():
    decode, _ = scripted()
    cell = decode.passes[0][1][2]
    assert shown_text(cell._replace(text=" a\nb\tc ")) == "a⏎b⇥c"


def test_insertions_and_deletions_have_colours_of_their_own():
    engine: Any = SimpleNamespace(
        mask_token_id=MASK, eos_token_ids=(EOS,), decode_tokens=lambda ids: "".join(WORDS[i] for i in ids if i < 90)
    )
    request = Request([0], Settings("Q_MODE", 0.7, 0.5, 16, 4, 20, 0.0, 0))
    steps = [
        Step(0, 0, [0, MASK, 3, 4], [], [3], [None, None, 0.9, 0.9], 0.0, 0, [1], [(2, 9), (2, MASK)]),
        Step(0, 1, [0, 1, 3, 4], [1], [], [None, 0.9, 0.9, 0.9], 0.25, 0),
    ]
    tracker = CellTracker(engine, request)
    decode = Decode("Tell", [(step, tracker.cells(step)) for step in steps], "cost")
    assert as_line(steps[0], decode.passes[0][1]) == "block 0 pass 1:  Once +_ -b- time {.}"
    assert as_line(steps[1], decode.passes[1][1]) == "block 0 pass 2:  Once [upon] time ."
    text = draw_line(steps[0], decode.passes[0][1])
    assert [str(span.style) for span in text.spans if "strike" in str(span.style) or "blue" in str(span.style)] == [
        "bold blue",
        "red strike",
    ]
    heading, first, _, _ = stepped(decode).rows
    assert [box.text for box in heading[-2:]] == ["inserted", "deleted"]
    assert [(box.text, box.fill) for box in first if box.fill in (INSERT, DELETE)] == [("", INSERT), ("b", DELETE)]
    for before, after in pairwise(box for box in first if box.width):
        assert before.x + before.width <= after.x
    shown = [[(box.text, box.fill) for box in frame.rows[1]] for frame in frames(decode)]
    assert ("b", DELETE) in shown[0]
    assert "b" not in {text for text, _ in (*shown[1], *shown[2])}
