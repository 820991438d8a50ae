"""Reading text from standard input and writing generated text to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from hildanext.errors import UsageError

# The C0 and C1 control characters except tab and newline.
_CONTROLS = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if code not in (9, 10))
NOT_UTF8 = "the prompt is not valid UTF-8 text"


def printable(text: str) -> str:
    """Remove control characters from generated text, so that it cannot control the terminal."""
    return text.translate(_CONTROLS)


def write_text(text: str) -> None:
    """Write text to stdout and flush: unchanged to pipes and files, without control characters to a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def checked(text: str) -> str:
    """Return the text. Raises UsageError if it contains lone surrogates, which Python may read for invalid UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(NOT_UTF8) from None
    return text


def read_input() -> str:
    """Read all of stdin. Raises UsageError if it is not UTF-8."""
    try:
        return checked(sys.stdin.read())
    except UnicodeDecodeError:
        raise UsageError(NOT_UTF8) from None


def input_lines() -> Iterator[str]:
    """Yield the lines of stdin without line ends. Raises UsageError if stdin is not UTF-8."""
    try:
        for line in sys.stdin:
            yield checked(line.rstrip("\n"))
    except UnicodeDecodeError:
        raise UsageError(NOT_UTF8) from None
