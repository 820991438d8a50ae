"""Reading typed lines with bracketed paste: pasted text stays in one line, with its line breaks, and is no command.

A terminal that was asked for it encloses pasted text in the sequences BEGIN and END.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

ASK, ASK_NO_MORE = "\x1b[?2004h", "\x1b[?2004l"
BEGIN, END = "\x1b[200~", "\x1b[201~"
MARK, ASCII_MARK = "\u2063", "\x1e"  # nobody types these: INVISIBLE SEPARATOR, RECORD SEPARATOR


@contextlib.contextmanager
def bracketed_paste() -> Iterator[Callable[[str], str]]:
    """Yield `typed_line`. Within the block the terminal encloses pasted text, if stderr is one that can."""
    terminal = Console(stderr=True)
    if not terminal.is_terminal or terminal.is_dumb_terminal or not _teach_readline():
        yield typed_line
        return

    def read_line(prompt: str) -> str:
        try:
            return typed_line(prompt)
        finally:  # readline has turned it off, but a paste may also come before the next prompt
            _send(ASK)

    _send(ASK)
    try:
        yield read_line
    finally:
        _send(ASK_NO_MORE)


def _teach_readline() -> bool:
    """Make readline take pasted text into the line, behind a mark: it does not tell what was pasted. False: it cannot."""
    try:
        import readline
    except ImportError:  # `input` then returns the sequences
        return True
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind(r'"\e[200;1~": bracketed-paste-begin')
    try:
        readline.parse_and_bind(rf'"\e[200~": "{MARK}\e[200;1~"')
    except UnicodeEncodeError:  # the locale has no Unicode; C-v inserts the control character C-^
        readline.parse_and_bind(r'"\e[200~": "\C-v\C-^\e[200;1~"')
    return True


def _send(sequence: str) -> None:
    print(sequence, end="", file=sys.stderr, flush=True)


def typed_line(prompt: str) -> str:
    """Read a line. A paste in it keeps its line breaks; if the line begins with one, a space stands before it.

    Raises what `input` raises: EOFError, KeyboardInterrupt, UnicodeDecodeError.
    """
    text = input(prompt)
    while text.rfind(BEGIN) > text.rfind(END):
        text += "\n" + input()
    is_pasted = text.startswith((MARK, ASCII_MARK, BEGIN))
    for mark in (MARK, ASCII_MARK, BEGIN, END):
        text = text.replace(mark, "")
    return f" {text}" if is_pasted else text
