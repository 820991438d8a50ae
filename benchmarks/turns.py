"""For decode.py: time of a conversation's fifth message, with and without the cache that the first four left."""

from __future__ import annotations

import statistics
import time
from typing import Any

from hildanext.decoding.engines import Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.events import Finished
from hildanext.decoding.settings import Settings

TURNS, MESSAGE, ANSWER, PAIRS = 5, 60, 64, 5


def fifth_turn(engine: TransformersEngine, ids: list[int], wanted: Settings) -> dict[str, Any]:
    """Seconds to the first block and to the end of the fifth answer, with and without the cached conversation.

    `ids`: token ids to cut the user's messages from. The two cases alternate, PAIRS times each.
    """
    prompts: list[list[int]] = []
    said: list[int] = []
    for turn in range(TURNS):
        said = said + ids[turn * MESSAGE : (turn + 1) * MESSAGE]
        prompts.append(said)
        engine.scheduler.reset_prefix_cache()  # as in the runs below; bf16 rounding depends on shapes, and a different answer would share less
        said = said + engine.generate(Request(said, wanted)).token_ids

    def last_turn(reuse: bool) -> tuple[float, float, int, list[int]]:
        engine.scheduler.reset_prefix_cache()
        engine.generate(Request(prompts[-2], wanted))
        if not reuse:
            engine.scheduler.reset_prefix_cache()
        began, first, tokens = time.perf_counter(), 0.0, []
        sequence = engine.submit(Request(prompts[-1], wanted))
        for event in engine.events(sequence):
            if isinstance(event, Finished):
                first = first or time.perf_counter() - began
                tokens += event.new_tokens
        return first, time.perf_counter() - began, sequence.prefix_tokens, tokens

    last_turn(True), last_turn(False)
    rows = [(last_turn(True), last_turn(False)) for _ in range(PAIRS)]
    return {
        "prompt": len(prompts[-1]),
        "reused": rows[-1][0][2],
        "first_block_s": [statistics.median(row[side][0] for row in rows) for side in (0, 1)],
        "whole_s": [statistics.median(row[side][1] for row in rows) for side in (0, 1)],
        "first_block_ratio": statistics.median(without[0] / reuse[0] for reuse, without in rows),
        "whole_ratio": statistics.median(without[1] / reuse[1] for reuse, without in rows),
        "identical": all(without[3] == reuse[3] for reuse, without in rows),
    }
