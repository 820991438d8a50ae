"""Token ids in, text out: pieces that never have to be taken back, and stop strings, which may begin in one block and
end in the next."""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class TextStream:
    """The text of a growing completion, cut before the first stop string."""

    def __init__(self, decode_tokens: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self.decode_tokens, self.stop = decode_tokens, stop
        self.token_ids: list[int] = []
        self.text = ""  # what has been handed out
        self.stopped = False

    def push(self, token_ids: list[int], last: bool) -> str:
        """Add tokens; returns the piece of text that is certain now.

        Until `last`, what may be the beginning of a stop string and half a character wait. When a stop string is complete
        `stopped` is set, the text ends before it, and `token_ids` keeps no token that the text does not need.
        """
        self.token_ids += token_ids
        text = self.decode_tokens(self.token_ids)
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
            while self.token_ids and self.decode_tokens(self.token_ids[:-1]).startswith(text):
                self.token_ids.pop()
        elif not last:
            text = text.removesuffix(REPLACEMENT)
            text = text[: len(text) - max((_begun(text, stop) for stop in self.stop), default=0)]
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def _begun(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
