"""Events of a sequence while it is decoded."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """One denoising pass. Positions count from `start`, the text position of `tokens[0]`."""

    block: int  # index of the block that is being drafted
    step: int  # index of the pass within the block
    tokens: list[int]  # the editable blocks and the current block after the pass
    drafted: list[int]
    edited: list[int]
    confidence: list[float | None]  # of each position's proposal; None if the pass could not change the position
    mask_ratio: float  # masked share of the current block before the pass
    start: int


class Finished(NamedTuple):
    """A block became final."""

    block: int
    new_tokens: list[int]  # the tokens that it adds to the completion
    text: str  # the text that became certain with it
