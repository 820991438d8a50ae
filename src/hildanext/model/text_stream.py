"""Turn a growing list of token ids into a stream of text that ends at a stop string.

Text is returned only when it is final. Stop strings may begin in one block and end in the next.
"""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # an incomplete character decodes to this


class TextStream:
    """The text of a completion as its tokens arrive, cut before the first stop string."""

    def __init__(self, decode_tokens: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self.decode_tokens, self.stop = decode_tokens, stop
        self.token_ids: list[int] = []
        self.text = ""  # returned by `push` so far
        self.stopped = False

    def push(self, token_ids: list[int], last: bool) -> str:
        """Add tokens and return the new text that is final.

        Unless `last` is set, an incomplete character and a possible beginning of a stop string are held back. When a
        stop string is complete, `stopped` becomes True, the text ends before it, and `token_ids` ends with the last
        token that the text needs.
        """
        self.token_ids += token_ids
        text = self.decode_tokens(self.token_ids)
        positions = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        if positions:
            self.stopped = True
            text = text[: min(positions)]
            while self.token_ids and self.decode_tokens(self.token_ids[:-1]).startswith(text):
                self.token_ids.pop()
        elif not last:
            text = text.removesuffix(REPLACEMENT)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)]
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that is a suffix of `text`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
