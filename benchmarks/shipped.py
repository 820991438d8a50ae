"""Compares the shipped model with its base on prompts unseen in training: equal text, quality, variety, speed.

    python recipes/hilda-smollm2-135m/prompts.py 48 --skip 5000 > familiar.txt
    python benchmarks/shipped.py --prompts familiar.txt --out runs/shipped/familiar.json

Text is decoded greedily in fp32. The truth is transformers' own `generate` on the base. Quality is the text's mean
log-likelihood per token under the base. Each runtime and weight format also tells where the first token differs, and by
how much the base prefers its own there; OpenVINO's texts also beside those of the base token by token in OpenVINO.

--speed: tokens per second of one request at a time; transformers' `generate`, the same runtime token by token and each
mode answer the same prompt in turn, and medians of the ratios are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from baselines import llama_cpp_rate
from results import load, machine

from hildanext.config import MODES, SHIPPED_MODEL, Config, load_config
from hildanext.decoding.engines import Completion, Request
from hildanext.decoding.engines.transformers import TransformersEngine
from hildanext.decoding.settings import Settings
from hildanext.evaluate.intervals import ratio
from hildanext.evaluate.judge import distinct_2, total_log_likelihood
from hildanext.files import write_json
from hildanext.model.ar_generate import ar_complete
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import CheckpointWithBase, load_with_base
from hildanext.model.prompts import read_prompts
from hildanext.provenance import git_revision, versions
from hildanext.server.base import TOKEN_BY_TOKEN

BASELINES = ("generate", "token by token")  # what the others are compared with
RUNTIMES = (("eager", "native"), ("openvino", "native"), ("openvino", "int8"))


class Way(NamedTuple):
    """Changes of the section `decode`, under the name that the report uses."""

    name: str
    decode: dict[str, Any]


def ways(k: int) -> list[Way]:
    everywhere = 1 + k + (k + 1) * k  # the last token, k drafts, and a group of k behind each of these
    return [
        *(Way(mode, {"mode": mode}) for mode in MODES),
        Way("EXACT, a group behind every draft", {"mode": "EXACT", "rows": everywhere}),
        Way("EXACT with lookups", {"mode": "EXACT", "lookup": 2}),
    ]


def open_engine(config: Config, lm: DiffusionLM, runtime: str, weights: str, **decode: Any) -> TransformersEngine:
    """An engine whose graph has the rows of these settings. Raises ModuleNotFoundError without OpenVINO."""
    engine = config.engine.model_copy(update={"runtime": runtime, "weights": weights})
    changes = {"engine": engine, "decode": config.decode.model_copy(update=decode)}
    return TransformersEngine(config.model_copy(update=changes), {}, lm)


def settings(config: Config, engine: TransformersEngine, decode: dict[str, Any], budget: int) -> Settings:
    changes = {"decode": config.decode.model_copy(update=decode)}
    return engine.settings(config.model_copy(update=changes))._replace(max_new_tokens=budget)


def complete(engine: TransformersEngine, prompts: list[list[int]], wanted: Settings) -> list[Completion]:
    engine.scheduler.reset_prefix_cache()
    return engine.generate_batch([Request(prompt, wanted) for prompt in prompts])


def text_of_base(loaded: CheckpointWithBase, prompts: list[list[int]], budget: int, file: Path) -> list[list[int]]:
    """The base's greedy tokens by transformers' own `generate`, one prompt at a time; kept in `file` as they come."""
    asked = {"base": loaded.base_config.base, "prompts": prompts, "budget": budget}
    stored = load(file)
    found: list[list[int]] = stored["texts"] if stored.get("asked") == asked else []
    for prompt in prompts[len(found) :]:
        found.append(ar_complete(loaded.base, loaded.base_tokenizer, prompt, budget).token_ids)
        write_json(file, {"asked": asked, "texts": found})
    return found


def score(
    loaded: CheckpointWithBase, prompts: list[list[int]], truth: list[list[int]], done: list[Completion]
) -> dict[str, Any]:
    """Figures of one way's answers beside the base's."""
    texts = [completion.token_ids for completion in done]
    log_p = [total_log_likelihood(loaded.base, prompt, ids) for prompt, ids in zip(prompts, texts, strict=True)]
    tokens = [float(len(ids)) for ids in texts]
    quality = ratio(log_p, tokens, 1000, 0)
    forwards = [float(completion.stats.forwards) for completion in done]
    speed = ratio(tokens, forwards, 1000, 0)
    return {
        "equal": sum(text == base for text, base in zip(texts, truth, strict=True)),
        "answers": len(done),
        "log_likelihood": quality.value,
        "interval": [quality.low, quality.high],
        "distinct_2": distinct_2(texts),
        "tokens_per_forward": speed.value,
        "tokens_per_forward_interval": [speed.low, speed.high],
        "rows": sum(completion.stats.rows for completion in done) / sum(forwards),
        "differences": differences(loaded, prompts, truth, texts),
        "samples": [completion.text for completion in done[:6]],
    }


def differences(
    loaded: CheckpointWithBase, prompts: list[list[int]], truth: list[list[int]], texts: list[list[int]]
) -> list[dict[str, Any]]:
    """`first_difference` of every text that has one."""
    gaps = (first_difference(loaded, *case) for case in zip(prompts, truth, texts, strict=True))
    return [gap for gap in gaps if gap is not None]


@torch.inference_mode()
def first_difference(
    loaded: CheckpointWithBase, prompt: list[int], base: list[int], text: list[int]
) -> dict[str, Any] | None:
    """Where a text leaves the base's, and the base's probabilities of both tokens there; None if they are equal."""
    at = next((i for i, (a, b) in enumerate(zip(base, text, strict=False)) if a != b), None)
    if at is None:
        return None
    logits = loaded.base(torch.tensor([prompt + base[:at]])).logits[0, -1].float()
    p = logits.softmax(-1)
    return {"token": at, "base": float(p[base[at]]), "other": float(p[text[at]])}


def speeds(
    rates: dict[str, Callable[[list[int]], float]], prompts: list[list[int]], against: tuple[str, ...]
) -> dict[str, Any]:
    """Median tokens per second of each, and the median of its ratio to each of `against` on the same prompt."""
    for rate in rates.values():
        rate(prompts[0])  # warm-up
    found: dict[str, list[float]] = {name: [] for name in rates}
    for number, prompt in enumerate(prompts):
        order = list(rates) if number % 2 else list(rates)[::-1]
        for name in order:
            found[name].append(rates[name](prompt))
    return {
        name: {
            "tokens_per_second": statistics.median(values),
            **{
                f"times {other}": statistics.median(a / b for a, b in zip(values, found[other], strict=True))
                for other in against
            },
        }
        for name, values in found.items()
    }


def measure_speed(
    config: Config, loaded: CheckpointWithBase, prompts: list[list[int]], budget: int, weights: str
) -> dict[str, Any]:
    """One request at a time in OpenVINO: one engine for all modes, and one whose graph has a single row for the base."""
    decodes = {"token by token": TOKEN_BY_TOKEN} | {mode: {"mode": mode} for mode in MODES}
    shared = open_engine(config, loaded.lm, "openvino", weights)
    of_base = open_engine(config, loaded.lm, "openvino", weights, **TOKEN_BY_TOKEN)
    engines = dict.fromkeys(decodes, shared) | {"token by token": of_base}

    def generate(prompt: list[int]) -> float:
        done = ar_complete(loaded.base, loaded.base_tokenizer, prompt, budget)
        return len(done.token_ids) / done.seconds

    def by(name: str) -> Callable[[list[int]], float]:
        def rate(prompt: list[int]) -> float:
            engine = engines[name]
            engine.scheduler.reset_prefix_cache()  # the base has no prompt cached either
            done = engine.generate(Request(prompt, settings(config, engine, decodes[name], budget)))
            return done.stats.tokens_per_second

        return rate

    try:
        found = speeds({"generate": generate} | {name: by(name) for name in engines}, prompts, BASELINES)
    finally:
        for engine in (shared, of_base):
            engine.close()
    rates_of_llama = [rate for rate in (llama_cpp_rate(prompts[0], budget) for _ in range(2)) if rate]
    if rates_of_llama:
        found["llama.cpp, the base's Q4_1 file"] = {"tokens_per_second": statistics.median(rates_of_llama)}
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", default=SHIPPED_MODEL)
    parser.add_argument("--out", type=Path, default=Path("runs/shipped.json"))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--speed", type=int, default=0, metavar="N", help="measure speed on the first N prompts, too")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="these ways, such as EXACT (default: all)")
    parser.add_argument("--only-eager", action="store_true", help="leave OpenVINO out")
    parser.add_argument("--set", action="append", default=[], help="override a key of the configuration")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    config = load_config(None, [f"model.base={json.dumps(args.model)}", 'model.dtype="float32"', *args.set])
    loaded = load_with_base(config.model)
    known = [way.name for way in ways(loaded.block_size)]
    if unknown := set(args.only or []) - set(known):
        sys.exit(f"--only {min(unknown)!r}: must be one of {', '.join(known)}")
    prompts = read_prompts(args.prompts, loaded.lm.tokenizer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    truth = text_of_base(loaded, prompts, args.tokens, args.out.with_suffix(".base.json"))
    tokens = [float(len(ids)) for ids in truth]
    log_p = [total_log_likelihood(loaded.base, prompt, ids) for prompt, ids in zip(prompts, truth, strict=True)]
    report: dict[str, Any] = {
        "model": args.model,
        "machine": machine(),
        "prompts": len(prompts),
        "tokens": args.tokens,
        "base": {"log_likelihood": sum(log_p) / sum(tokens), "distinct_2": distinct_2(truth)},
        "ways": {},
    }
    for runtime, weights in RUNTIMES[:1] if args.only_eager else RUNTIMES:
        engine = open_engine(config, loaded.lm, runtime, weights)
        every = ways(loaded.block_size) if runtime == "eager" else [Way("EXACT", {"mode": "EXACT"})]
        for way in [way for way in every if args.only is None or way.name in args.only]:
            wanted = settings(config, engine, way.decode, args.tokens)
            done = complete(engine, prompts, wanted)
            found = score(loaded, prompts, truth, done)
            if runtime != "eager":
                # Rounded weights are another model, so EXACT is also compared with the base in the same runtime.
                one_row = settings(config, engine, TOKEN_BY_TOKEN, args.tokens)
                own, texts = ([x.token_ids for x in some] for some in (complete(engine, prompts, one_row), done))
                found["beside_own_base"] = {
                    "equal": sum(a == b for a, b in zip(own, texts, strict=True)),
                    "differences": differences(loaded, prompts, own, texts),
                }
            name = way.name if runtime == "eager" else f"{way.name}, {runtime} {weights}"
            report["ways"][name] = found | {"settings": wanted._asdict()}
            said = f"{found['equal']} of {found['answers']} equal, {found['tokens_per_forward']:.2f} tokens a forward"
            print(f"{name}: {said}, {found['log_likelihood']:.3f} nats", file=sys.stderr, flush=True)
            write_json(args.out, report)
        engine.close()
    if args.speed:
        report["speed"] = {
            weights: measure_speed(config, loaded, prompts[: args.speed], args.tokens, weights)
            for weights in ("native", "int8")
        }
        for weights, found in report["speed"].items():
            for name, rate in found.items():
                print(f"{weights}, {name}: {rate}", file=sys.stderr, flush=True)
    write_json(args.out, report | {"versions": versions(), "git": git_revision()})


if __name__ == "__main__":
    main()
