"""Compares the shipped model with its base on prompts unseen in training: quality, variety, speed, effect of editing.

    python recipes/hilda-smollm2-135m/prompts.py 48 --skip 5000 > heldout.txt
    python benchmarks/shipped.py --prompts heldout.txt --out runs/shipped.json

Both sides decode greedily in the same `model.dtype`. Quality is the text's mean log-likelihood per token under the
base. Speed is measured one request at a time: the base's `generate` and each mode answer the same prompt in turn, and
the median of the ratios of tokens per second is reported. --sweep also measures the effect of editing: S_MODE against a
sweep of thresholds with editing off, at equal tokens per forward.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from hildanext.config import SHIPPED_MODEL, Config, load_config
from hildanext.decoding.engines import Request
from hildanext.decoding.settings import Settings, resolve
from hildanext.evaluate.command import open_models
from hildanext.evaluate.intervals import Scored, gain_at_equal_speed, ratio
from hildanext.evaluate.judge import distinct_2, total_log_likelihood
from hildanext.evaluate.ways import Models, Question, TimedAnswer, Way, complete
from hildanext.files import write_json
from hildanext.model.ar_generate import ar_complete
from hildanext.model.prompts import read_prompts
from hildanext.provenance import git_revision, versions

SWEEP = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)  # tau_mask values of the comparison curve, with editing off
MODES = ("Q_MODE", "S_MODE")


def settings(config: Config, models: Models, mode: str, **changes: Any) -> Settings:
    assert models.lm.block_size is not None
    decode = config.decode.model_copy(update={"mode": mode, **changes})
    return resolve(decode, models.lm.block_size, models.engine.presets)


def ways(config: Config, models: Models) -> list[Way]:
    found = [Way("AR", None)]
    for mode in MODES:
        found += [
            Way(mode, settings(config, models, mode)),
            Way(f"{mode}, editing off", settings(config, models, mode, tau_edit=None)),
        ]
    return found


def sweep(config: Config, models: Models) -> list[Way]:
    """S_MODE with editing off at the thresholds of SWEEP; block size and budget unchanged."""
    return [
        Way(f"editing off, tau_mask {tau}", settings(config, models, "S_MODE", tau_edit=None, tau_mask=tau))
        for tau in SWEEP
    ]


def score(models: Models, prompts: list[list[int]], answers: list[TimedAnswer]) -> Scored:
    log_p = [
        total_log_likelihood(models.base, prompt, answer.token_ids)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Scored(log_p, [len(answer.token_ids) for answer in answers], [answer.forwards for answer in answers])


def row(way: Way, answers: list[TimedAnswer], scored: Scored) -> dict[str, Any]:
    quality = ratio(scored.log_p, scored.tokens, 1000, 0)
    return {
        "log_likelihood": quality.value,
        "interval": [quality.low, quality.high],
        "distinct_2": distinct_2([answer.token_ids for answer in answers]),
        "tokens_per_forward": sum(scored.tokens) / sum(scored.forwards),
        "tokens_per_second_side_by_side": sum(scored.tokens) / sum(answer.seconds for answer in answers),
        "edits": sum(answer.edits for answer in answers),
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "settings": None if way.settings is None else way.settings._asdict(),
        "samples": [answer.text for answer in answers[:6]],
    }


def speed(models: Models, modes: list[Way], prompts: list[list[int]], budget: int) -> dict[str, dict[str, Any]]:
    """Ratio of each mode's tokens per second to the base's `generate`, one prompt at a time, alternating."""

    def base(prompt: list[int]) -> float:
        done = ar_complete(models.base, models.lm.tokenizer, prompt, budget)
        return len(done.token_ids) / done.seconds

    def mode(way: Way, prompt: list[int]) -> float:
        assert way.settings is not None
        models.engine.scheduler.reset_prefix_cache()  # no prompt cache: the base has none either
        request = Request(prompt, way.settings._replace(max_new_tokens=budget))
        return models.engine.generate(request).stats.tokens_per_second

    found = {}
    for way in modes:
        base(prompts[0])  # warm-up
        mode(way, prompts[0])
        pairs = []
        for number, prompt in enumerate(prompts):
            if number % 2:  # alternate which side goes first
                mode_rate = mode(way, prompt)
                pairs.append((base(prompt), mode_rate))
            else:
                pairs.append((base(prompt), mode(way, prompt)))
        ratios = sorted(mode_rate / base_rate for base_rate, mode_rate in pairs)
        found[way.name] = {
            "parent_tokens_per_second": statistics.median(base_rate for base_rate, _ in pairs),
            "tokens_per_second": statistics.median(mode_rate for _, mode_rate in pairs),
            "median_ratio": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else None,
            "pairs": len(pairs),
        }
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", default=SHIPPED_MODEL)
    parser.add_argument("--out", type=Path, default=Path("runs/shipped.json"))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=16, help="number of prompts for the speed measurement")
    parser.add_argument("--sweep", action="store_true", help="also measure a sweep of thresholds with editing off")
    parser.add_argument("--set", action="append", default=[], help="override a key of the configuration")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    config = load_config(None, [f"model.base={json.dumps(args.model)}", *args.set])
    models, about = open_models(config, None)
    prompts = read_prompts(args.prompts, models.lm.tokenizer)
    all_ways, curve = ways(config, models), sweep(config, models) if args.sweep else []
    rows, scores = {}, {}
    for way in [*all_ways, *curve]:
        answers = complete(models, way, [Question(prompt, args.tokens) for prompt in prompts], "held-out prompts")
        scores[way.name] = score(models, prompts, answers)
        rows[way.name] = row(way, answers, scores[way.name])
        figures = {key: round(value, 3) for key, value in rows[way.name].items() if isinstance(value, float)}
        print(f"{way.name}: {figures}", file=sys.stderr, flush=True)
    speeds = speed(models, [way for way in all_ways if way.name in MODES], prompts[: args.pairs], args.tokens)
    models.engine.close()
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report = {**about, "machine": machine | {"threads": torch.get_num_threads()}, "prompts": len(prompts), "rows": rows}
    report["speed"] = speeds
    for name, found in speeds.items():
        print(f"{name}: {found['median_ratio']:.2f} times the base's tokens per second ({found['pairs']} pairs)")
    if curve:
        gain = gain_at_equal_speed(scores["S_MODE"], [scores[way.name] for way in curve], 1000, 0)
        report["editing_gain_at_equal_tokens_per_forward"] = None if math.isnan(gain.value) else gain._asdict()
        if math.isnan(gain.value):
            print("editing: no comparison, because S_MODE's tokens per forward lie outside the sweep's")
        else:
            print(
                f"editing: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] nats per token "
                "at equal tokens per forward"
            )
    write_json(args.out, report | {"versions": versions(), "git": git_revision()})


if __name__ == "__main__":
    main()
