"""Text from standard input, and a model's text to a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from hildanext.errors import UsageError

# C0 and C1 without tab and newline.
_CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if code not in (9, 10))
NOT_UTF8 = "the prompt is not valid UTF-8 text"


def printable(text: str) -> str:
    """A model's text without control characters: it must not steer the terminal."""
    return text.translate(_CONTROLS)


def write_text(text: str) -> None:
    """To stdout at once: as it is into pipes and files, printable on a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def checked(text: str) -> str:
    """The text. Raises UsageError for one with bytes that are no UTF-8, which Python may hand on as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(NOT_UTF8) from None
    return text


def read_input() -> str:
    """All of stdin. Raises UsageError where it is not UTF-8."""
    try:
        return checked(sys.stdin.read())
    except UnicodeDecodeError:
        raise UsageError(NOT_UTF8) from None


def input_lines() -> Iterator[str]:
    """Lines of stdin without their ends. Raises UsageError where it is not UTF-8."""
    try:
        for line in sys.stdin:
            yield checked(line.rstrip("\n"))
    except UnicodeDecodeError:
        raise UsageError(NOT_UTF8) from None
