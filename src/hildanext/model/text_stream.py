"""Turn a growing list of token ids into a stream of text that ends at a stop string.

Text is returned only when it is final. Stop strings may begin in one block and end in the next.
"""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # an incomplete character decodes to one or more of these
MOST_MISSING = 3  # bytes, and so tokens, of a UTF-8 character that is not complete


def complete_text(decode_tokens: Callable[[list[int]], str], token_ids: list[int]) -> str:
    """The text of the tokens without a character that the last of them begin but do not end.

    A tokenizer with byte fallback (Llama 2, Mistral, Gemma) decodes a run of bytes to replacement characters, one for
    each byte, as long as the run is not valid UTF-8 as a whole. So the text can be longest without the last tokens.
    """
    text = decode_tokens(token_ids)
    if not text.endswith(REPLACEMENT):
        return text
    shorter = [token_ids[: len(token_ids) - n] for n in range(1, MOST_MISSING + 1)]
    return max((t.rstrip(REPLACEMENT) for t in (text, *map(decode_tokens, shorter))), key=len)


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
        text = complete_text(self.decode_tokens, self.token_ids)
        positions = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        if positions:
            self.stopped = True
            text = text[: min(positions)]
            self._drop_tokens_behind(text)
        elif last:
            whole = self.decode_tokens(self.token_ids)
            text = whole if whole.startswith(text) else text + REPLACEMENT
        else:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)]
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _drop_tokens_behind(self, text: str) -> None:
        """Remove the last tokens as long as the others decode to `text` and more."""
        needed = n = len(self.token_ids)
        while n > 0 and needed - n <= MOST_MISSING:  # a cut character hides the text before it
            n -= 1
            if self.decode_tokens(self.token_ids[:n]).startswith(text):
                needed = n
        del self.token_ids[needed:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that is a suffix of `text`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
