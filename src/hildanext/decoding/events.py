"""Events of a sequence while it is decoded, and its cost at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Step(NamedTuple):
    """One pass. Positions count from `start`, the text position of `tokens[0]`.

    Where drafts are verified, `tokens` are the new ones: accepted drafts, then the base's own choice. That one counts as
    edited if it corrects a draft. Each pass is a block of its own.
    """

    block: int  # index of the block that is being drafted
    step: int  # index of the pass within the block
    tokens: list[int]  # the editable blocks and the current block after the pass
    drafted: list[int]
    edited: list[int]
    confidence: list[float | None]  # of each position's proposal; None if the pass could not change the position
    mask_ratio: float  # masked share of the current block before the pass
    start: int
    inserted: list[int] = []  # noqa: RUF012 - never changed; masks that the pass put before a token
    deleted: list[tuple[int, int]] = []  # noqa: RUF012 - never changed; (place of the token that follows, dropped token)


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, in the pass that fixed it."""

    token: int
    logprob: float  # natural logarithm of its probability at temperature 1
    top: list[
        tuple[int, float]
    ]  # (token, log-probability) of the likeliest tokens at its position, the likeliest first


class Finished(NamedTuple):
    """A block became final."""

    block: int
    new_tokens: list[int]  # the tokens that it adds to the completion
    text: str  # the text that became certain with it
    logprobs: list[TokenLogprob] | None = None  # of `new_tokens`, where the request asks for them


@dataclass(frozen=True)
class Stats:
    """The cost of a completion."""

    forwards: int  # denoising passes; each also caches the tokens before the block that are not cached yet
    prefill_forwards: int  # forwards of prompt chunks, which denoise nothing
    tokens_per_forward: float
    mask_ratio: list[float]  # masked share of the current block before each pass
    drafts: int
    edits: int
    seconds: float
    tokens_per_second: float
    prefix_tokens: int = 0  # prompt tokens whose keys and values were cached by an earlier request
    seed: int | None = None  # of the sampling noise; the same seed gives the same text. None: decoded greedily
    insertions: int = 0
    deletions: int = 0
    # Of completions that verify drafts:
    accepted: int = 0  # drafts that became text
    rows: int = 0  # tokens and masks of all passes
    tried_by_offset: list[int] = field(default_factory=list)  # verified after right drafts: of lookups, rows 1 ... k
    right_by_offset: list[int] = field(default_factory=list)

    @property
    def changes(self) -> str:
        """What the passes did, in words: edits, or how many of the verified drafts were accepted."""
        if self.rows:
            return f"{self.accepted} of {self.drafts} drafts accepted"
        moves = (
            f", {self.insertions} insertions, {self.deletions} deletions" if self.insertions + self.deletions else ""
        )
        return f"{self.edits} edits{moves}"
