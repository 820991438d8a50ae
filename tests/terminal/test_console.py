"""Text from standard input, and a model's text to a terminal."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hildanext.cli import main
from hildanext.config import Config, parse_config
from hildanext.decoding.engines import Completion, Stats, open_engine
from hildanext.decoding.events import Finished
from hildanext.terminal.chat import Chat
from hildanext.terminal.console import printable
from hildanext.terminal.generate import _consume
from hildanext.terminal.live import PlainAnswer

STEERING = "one \x1b[31mtwo\x07\r\x9bthree\tfour\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def done():
    return Completion("", [], "stop", "e", {}, "Q_MODE", 0.5, None, Stats(1, 0, 1.0, [], 0, 0, 1.0, 1.0))


@given(st.text())
def test_nothing_but_tabs_and_newlines_steers(text):
    shown = printable(text)
    assert not [c for c in shown if (ord(c) < 32 or 127 <= ord(c) < 160) and c not in "\t\n"]
    assert [c for c in text if c.isprintable()] == [c for c in shown if c.isprintable()]


@pytest.mark.parametrize(("stdout", "expected"), [(Terminal, "one [31mtwothree\tfour\n"), (io.StringIO, STEERING)])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_terminal_is_not_steered_and_a_pipe_gets_the_text(monkeypatch, stdout, expected, command):
    out = stdout()
    monkeypatch.setattr(sys, "stdout", out)
    if command == "generate":

        class Engine:
            def stream(self, request):
                yield Finished(0, [1], STEERING)
                yield done()

        _consume(Engine(), None, True)
        assert out.getvalue() == expected
    else:
        with PlainAnswer(None, trace=False) as shown:
            shown.show(Finished(0, [1], STEERING))
        assert out.getvalue() == expected + "\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is Python's way in the C locale
@pytest.mark.parametrize("argv", [["generate", "-"], ["chat"]])
def test_input_that_is_not_utf8_is_one_line(monkeypatch, capsys, converted, tmp_path, errors, argv):
    (tmp_path / "c.json").write_text(converted.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    assert main([*argv, "--config", str(tmp_path / "c.json"), "--set", 'engine.order=["dummy"]']) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == f"hildanext {argv[0]}: the prompt is not valid UTF-8 text"


def test_a_typed_line_that_is_not_utf8_is_told_and_the_talk_goes_on(monkeypatch, capsys):
    typed = iter([UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), "caf\udce9", "/help", EOFError()])

    def type_line(prompt):
        line = next(typed)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_line)
    chat = Chat(Config(), open_engine(parse_config({"engine": {"order": ["dummy"]}})), None)
    chat.interactive = True
    assert list(chat.lines()) == ["/help"]
    assert capsys.readouterr().err.count("the prompt is not valid UTF-8 text") == 2


def test_an_argument_that_is_not_utf8_is_one_line(capsys):
    assert main(["generate", "caf\udce9", "--set", 'engine.order=["dummy"]']) == 2
    assert "the prompt is not valid UTF-8 text" in capsys.readouterr().err
