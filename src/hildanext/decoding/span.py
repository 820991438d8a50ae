"""What one sequence puts into a forward, what decoding knows of the vocabulary, and what a slot of the cache holds."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from hildanext.decoding.runtimes.protocol import GroupRows
from hildanext.decoding.settings import Settings
from hildanext.diffusion.edits import EditTokens


class Vocabulary(NamedTuple):
    """The ids that decoding needs, and the prediction convention: if `shifted`, logits at i-1 predict token i."""

    size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]  # any of them ends a text
    shifted: bool
    holes: tuple[int, ...] = ()  # ids below `size` that no text has
    gated: bool = False  # clean tokens run through the base, causal
    edit_tokens: EditTokens | None = None  # None: no insertions and deletions


class Span(NamedTuple):
    """The tokens of one sequence in one forward. Text position p is query p - start."""

    start: int  # text position of the first token; all positions below it are cached
    tokens: list[int]
    visible: list[int]  # each query attends to the text positions below this
    wanted: list[int]  # text positions that need a proposal; empty for a prefill chunk
    groups: GroupRows | None = None  # of a gated model


class CachedText(Protocol):
    """A sequence whose keys and values a slot holds."""

    settings: Settings
    tokens: list[int]
    num_cached_tokens: int

    @property
    def reusable_prompt(self) -> int:
        """Length of its prompt that another sequence can reuse."""
        ...
