"""Cost of structured output: seconds of a pass with and without a grammar, in pairs, on the bundled model.

    python benchmarks/structured.py --pairs 20 --threads 1

Each pair decodes the same prompt twice, one request at a time: free, and under a JSON Schema. Both have passes of the
same number of rows. With one thread the time is that thread's CPU time, which other work on the machine does not
change; with several it is the wall clock's. Prints a JSON object for each mode: the median over the pairs of a pass's milliseconds, their
ratio, and the tokens of a pass. The schemas' strings are long, so that passes are many and few tokens are forced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from hildanext.config import SHIPPED_MODEL, load_config
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.grammar import Grammar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 20, "maxLength": 60},
        "summary": {"type": "string", "minLength": 60, "maxLength": 160},
        "tags": {"type": "array", "items": {"enum": ["animal", "sea", "city", "winter"]}, "minItems": 2, "maxItems": 4},
        "pages": {"type": "integer", "minimum": 10, "maximum": 999},
    },
    "required": ["title", "summary", "tags", "pages"],
    "additionalProperties": False,
}
PROMPTS = ("Invent a book about a fox.", "Invent a book about a lighthouse.", "Invent a book about a lost ring.")
MODES: dict[str, dict[str, Any]] = {
    "EXACT": {"mode": "EXACT", "tau_accept": 1.0},
    "S_MODE": {"mode": "S_MODE", "tau_accept": 0.2},
    "blocks": {"mode": "Q_MODE", "tau_accept": None, "tau_mask": 0.7, "tau_edit": None},
}


def timed(engine: TransformersEngine, request: Request, clock: Callable[[], float]) -> tuple[float | None, Completion]:
    """Milliseconds of a pass and the completion. The first pass also runs the prompt and is left out: None if it was alone."""
    engine.scheduler.reset_prefix_cache()
    sequence, seconds = engine.submit(request), []
    while sequence.finish_reason is None:
        began = clock()
        events = engine.step()
        seconds.append(clock() - began)
    done = next(event for _, event in events if isinstance(event, Completion))
    return statistics.mean(seconds[1:]) * 1e3 if len(seconds) > 1 else None, done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runtime", default="eager")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(None, [f"engine.runtime={args.runtime}", "model.dtype=float32"], SHIPPED_MODEL)
    engine = TransformersEngine(config, {})
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    began = time.perf_counter()
    compiled = engine.compile(Grammar.of_schema(SCHEMA))
    first_ms = (time.perf_counter() - began) * 1e3
    for name, changes in MODES.items():
        settings = engine.settings(config)._replace(max_new_tokens=96, **changes)
        times, rates, ended = [], [], 0
        for i in range(args.pairs):
            ids = engine.encode([{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}])
            free_ms, free = timed(engine, Request(ids, settings), clock)
            bound_ms, bound = timed(engine, Request(ids, settings, compiled), clock)
            ended += bound.finish_reason == "stop"
            rates.append((free.stats.tokens_per_forward, bound.stats.tokens_per_forward))
            if free_ms is not None and bound_ms is not None:
                times.append((free_ms, bound_ms))
        found = {
            "mode": name,
            "timed_pairs": len(times),
            "free_ms": round(statistics.median(ms for ms, _ in times), 2),
            "structured_ms": round(statistics.median(ms for _, ms in times), 2),
            "ratio": round(statistics.median(b / f for f, b in times), 3),
            "free_tokens_per_pass": round(statistics.mean(rate for rate, _ in rates), 2),
            "structured_tokens_per_pass": round(statistics.mean(rate for _, rate in rates), 2),
            "complete": f"{ended} of {args.pairs}",
            "first_compile_ms": round(first_ms),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
