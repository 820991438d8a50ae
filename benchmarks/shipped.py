"""The shipped model beside its parent on prompts that training has not seen: quality, variety, speed, what editing gives.

    python recipes/hilda-smollm2-135m/prompts.py 48 --skip 1632 > heldout.txt
    python benchmarks/shipped.py --prompts heldout.txt --out runs/shipped.json

Greedy, `model.dtype` the same on both sides. Quality is the parent's mean log-likelihood a token of the text.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from hildanext.chat import read_prompts
from hildanext.config import SHIPPED_MODEL, load_config
from hildanext.decode import Settings, resolve
from hildanext.evaluate.answers import Question, Way, answer
from hildanext.evaluate.command import open_models
from hildanext.evaluate.intervals import ratio
from hildanext.evaluate.judge import distinct_2, parent_log_likelihood
from hildanext.files import write_json
from hildanext.runs import git_revision, versions

SWEEP = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # tau_mask with editing off: the curve that editing is compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", default=SHIPPED_MODEL)
    parser.add_argument("--out", type=Path, default=Path("runs/shipped.json"))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--sweep", action="store_true", help="also editing off at other thresholds")
    parser.add_argument("--set", action="append", default=[], help="override a key of the configuration")
    args = parser.parse_args()
    config = load_config(None, [f"model.base={json.dumps(args.model)}", *args.set])
    models, about = open_models(config, None)
    prompts = read_prompts(args.prompts, models.lm.tokenizer)
    trained = models.lm.block_size
    assert trained is not None

    def settings(mode: str, **changes: Any) -> Settings:
        return resolve(config.decode.model_copy(update={"mode": mode, **changes}), trained, models.engine.presets)

    everyone = [Way("AR", None)]
    for mode in ("Q_MODE", "S_MODE"):
        everyone += [Way(mode, settings(mode)), Way(f"{mode}, editing off", settings(mode, tau_edit=None))]
    if args.sweep:
        block = settings("S_MODE").block_size
        everyone += [
            Way(f"editing off, tau_mask {tau}", settings("S_MODE", tau_edit=None, tau_mask=tau, block_size=block))
            for tau in SWEEP
        ]
    rows = {}
    for way in everyone:
        answers = answer(models, way, [Question(prompt, args.tokens) for prompt in prompts], "held-out prompts")
        counts = [len(one.token_ids) for one in answers]
        log_p = [
            parent_log_likelihood(models.base, prompt, one.token_ids) * len(one.token_ids) if one.token_ids else 0.0
            for prompt, one in zip(prompts, answers, strict=True)
        ]
        score = ratio(log_p, counts, 1000, 0)
        rows[way.name] = {
            "log_likelihood": score.value,
            "interval": [score.low, score.high],
            "distinct_2": distinct_2([one.token_ids for one in answers]),
            "tokens_per_forward": sum(counts) / sum(one.forwards for one in answers),
            "tokens_per_second": sum(counts) / sum(one.seconds for one in answers),
            "edits": sum(one.edits for one in answers),
            "ended": sum(one.ended for one in answers) / len(answers),
            "settings": None if way.settings is None else way.settings._asdict(),
            "samples": [one.text for one in answers[:6]],
        }
        told = {key: round(value, 3) for key, value in rows[way.name].items() if isinstance(value, float)}
        print(f"{way.name}: {told}", file=sys.stderr, flush=True)
    models.engine.close()
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report = {**about, "machine": machine | {"threads": torch.get_num_threads()}, "prompts": len(prompts), "rows": rows}
    write_json(args.out, report | {"versions": versions(), "git": git_revision()})


if __name__ == "__main__":
    main()
