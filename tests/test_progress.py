"""Progress: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import itertools

import pytest

from hildanext import progress as module
from hildanext.progress import duration, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def clock(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Every look at the clock is `step` seconds after the one before."""
    ticks = itertools.count(0.0, step)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ticks))


def test_a_terminal_gets_a_bar_with_rate_and_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stderr = Terminal()
    monkeypatch.setattr(module.sys, "stderr", stderr)
    with progress("convert", 4, "steps") as advance:
        for done in range(1, 5):
            advance(done, f"loss {done}.5")
    drawn = stderr.getvalue()
    for part in ("convert", "4/4", "steps", "/s", "left", "loss 4.5"):
        assert part in drawn


def test_a_log_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock(monkeypatch, 2.0)  # twice read for a line, once for none
    with progress("tokenize", 100, "MB", start=20) as advance:
        for done in range(30, 101, 10):
            advance(done, "note")
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 8
    assert lines[-1].startswith("tokenize: 100/100 MB, ")
    assert lines[-1].endswith("0:00 left  note")
    rate = float(lines[0].split(" MB, ")[1].split("/s")[0])
    done = float(lines[0].split()[1].split("/")[0])
    left = int(lines[0].split("0:")[1][:2])
    assert left == int((100 - done) / rate)


def test_without_a_total_there_is_no_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock(monkeypatch, 20.0)
    with progress("prepare", None, "documents") as advance:
        advance(5)
    assert capsys.readouterr().err == "prepare: 5 documents, 0.1/s\n"


def test_durations():
    for seconds, text in [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3723, "1:02:03")]:
        assert duration(seconds) == text, (seconds, text)
