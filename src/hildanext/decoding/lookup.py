"""Drafts without a model: what followed the same last words earlier in the text (prompt lookup decoding, Saxena 2023)."""

from __future__ import annotations


class Lookup:
    """The continuations of n-grams of a text that grows at its end."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest, self.longest = shortest, longest
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> position after its last occurrence

    def extend(self, tokens: list[int]) -> None:
        """Add tokens at the end of the text."""
        for token in tokens:
            # The n-grams that end before this token get a continuation.
            for n in range(self.shortest, self.longest + 1):
                if len(self.tokens) >= n:
                    self.follows[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def drafts(self, ahead: list[int], most: int) -> tuple[list[int], int]:
        """At most `most` tokens that followed the longest earlier occurrence of the end of text + `ahead`, and its length.

        ahead: drafts that are not part of the text yet. Returns ([], 0) if no n-gram occurs earlier.
        """
        for n in range(self.longest, self.shortest - 1, -1):
            end = (self.tokens[-n:] + ahead)[-n:]
            position = self.follows.get(tuple(end)) if len(end) == n else None
            if position is not None:
                return (self.tokens + ahead)[position : position + most], n
        return [], 0
