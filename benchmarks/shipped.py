"""The shipped model beside its parent on prompts that training has not seen: quality, variety, speed, what editing gives.

    python recipes/hilda-smollm2-135m/prompts.py 48 --skip 5000 > heldout.txt
    python benchmarks/shipped.py --prompts heldout.txt --out runs/shipped.json

Greedy, `model.dtype` the same on both sides. Quality is the parent's mean log-likelihood a token of the text. Tokens per second
are measured one request at a time, the parent's `generate` and each mode in turn on the same prompt: the median of the ratios.
With --sweep also what editing gives: S_MODE against editing off at the thresholds of a sweep, at equal tokens per forward.
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
from hildanext.decoding.rule import Settings, resolve
from hildanext.evaluate.command import open_models
from hildanext.evaluate.intervals import Scored, gain_at_equal_speed, ratio
from hildanext.evaluate.judge import distinct_2, parent_log_likelihood
from hildanext.evaluate.ways import Models, Question, Way, WayAnswer, answer
from hildanext.files import write_json
from hildanext.model.ar_generate import ar_complete
from hildanext.model.prompts import read_prompts
from hildanext.provenance import git_revision, versions

SWEEP = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)  # tau_mask with editing off: the curve to compare with
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
    """S_MODE with editing off at other thresholds; its block size, its budget."""
    return [
        Way(f"editing off, tau_mask {tau}", settings(config, models, "S_MODE", tau_edit=None, tau_mask=tau))
        for tau in SWEEP
    ]


def score(models: Models, prompts: list[list[int]], answers: list[WayAnswer]) -> Scored:
    log_p = [
        parent_log_likelihood(models.base, prompt, one.token_ids) * len(one.token_ids) if one.token_ids else 0.0
        for prompt, one in zip(prompts, answers, strict=True)
    ]
    return Scored(log_p, [len(one.token_ids) for one in answers], [one.forwards for one in answers])


def row(way: Way, answers: list[WayAnswer], scored: Scored) -> dict[str, Any]:
    quality = ratio(scored.log_p, scored.tokens, 1000, 0)
    return {
        "log_likelihood": quality.value,
        "interval": [quality.low, quality.high],
        "distinct_2": distinct_2([one.token_ids for one in answers]),
        "tokens_per_forward": sum(scored.tokens) / sum(scored.forwards),
        "tokens_per_second_side_by_side": sum(scored.tokens) / sum(one.seconds for one in answers),
        "edits": sum(one.edits for one in answers),
        "ended": sum(one.ended for one in answers) / len(answers),
        "settings": None if way.settings is None else way.settings._asdict(),
        "samples": [one.text for one in answers[:6]],
    }


def speed(models: Models, modes: list[Way], prompts: list[list[int]], budget: int) -> dict[str, dict[str, Any]]:
    """Tokens per second of each mode over those of the parent's `generate`, a prompt at a time and in turn."""

    def parent(prompt: list[int]) -> float:
        done = ar_complete(models.base, models.lm.tokenizer, prompt, budget)
        return len(done.token_ids) / done.seconds

    def mode(way: Way, prompt: list[int]) -> float:
        assert way.settings is not None
        models.engine.scheduler.forget()  # the parent computes every prompt, too
        request = Request(prompt, way.settings._replace(max_new_tokens=budget))
        return models.engine.generate(request).stats.tokens_per_second

    found = {}
    for way in modes:
        parent(prompts[0])
        mode(way, prompts[0])
        pairs = []
        for number, prompt in enumerate(prompts):
            if number % 2:  # neither side always goes first
                mine = mode(way, prompt)
                pairs.append((parent(prompt), mine))
            else:
                pairs.append((parent(prompt), mode(way, prompt)))
        ratios = sorted(mine / theirs for theirs, mine in pairs)
        found[way.name] = {
            "parent_tokens_per_second": statistics.median(theirs for theirs, _ in pairs),
            "tokens_per_second": statistics.median(mine for _, mine in pairs),
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
    parser.add_argument("--pairs", type=int, default=16, help="prompts on which speed is measured")
    parser.add_argument("--sweep", action="store_true", help="also editing off at other thresholds")
    parser.add_argument("--set", action="append", default=[], help="override a key of the configuration")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    config = load_config(None, [f"model.base={json.dumps(args.model)}", *args.set])
    models, about = open_models(config, None)
    prompts = read_prompts(args.prompts, models.lm.tokenizer)
    everyone, curve = ways(config, models), sweep(config, models) if args.sweep else []
    rows, scores = {}, {}
    for way in [*everyone, *curve]:
        answers = answer(models, way, [Question(prompt, args.tokens) for prompt in prompts], "held-out prompts")
        scores[way.name] = score(models, prompts, answers)
        rows[way.name] = row(way, answers, scores[way.name])
        told = {key: round(value, 3) for key, value in rows[way.name].items() if isinstance(value, float)}
        print(f"{way.name}: {told}", file=sys.stderr, flush=True)
    faster = speed(models, [way for way in everyone if way.name in MODES], prompts[: args.pairs], args.tokens)
    models.engine.close()
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report = {**about, "machine": machine | {"threads": torch.get_num_threads()}, "prompts": len(prompts), "rows": rows}
    report["speed"] = faster
    for name, one in faster.items():
        print(f"{name}: {one['median_ratio']:.2f} times the parent's tokens per second ({one['pairs']} pairs)")
    if curve:
        gain = gain_at_equal_speed(scores["S_MODE"], [scores[way.name] for way in curve], 1000, 0)
        report["editing_gain_at_equal_tokens_per_forward"] = None if math.isnan(gain.value) else gain._asdict()
        if math.isnan(gain.value):
            print("editing: S_MODE's tokens per forward lie outside the sweep's; nothing to compare with")
        else:
            print(
                f"editing: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] nats a token at equal tokens per forward"
            )
    write_json(args.out, report | {"versions": versions(), "git": git_revision()})


if __name__ == "__main__":
    main()
