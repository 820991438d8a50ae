"""Compares the two prediction conventions on SmolLM2-135M and GSM8K: same budget, seed, rows and held-out noise.

    python benchmarks/conventions.py --gsm8k path/to/gsm8k/train.jsonl --out runs/conventions

Prints a Markdown table with held-out accuracy and loss on masked tokens at mask rates 0.1 to 1.0, speed and time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from hildanext.config import load_config
from hildanext.data.prepare import prepare_data
from hildanext.data.rows import open_rows
from hildanext.data.tokenize import tokenize_data
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.pretrained import load_tokenizer
from hildanext.training.convert import convert_wsd
from hildanext.training.held_out import evaluate_denoising

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2-135m.json"
EVAL_ROWS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--out", default="runs/conventions")
    parser.add_argument("--set", action="append", default=[], help="override a key of the configuration")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.gsm8k, out / "gsm8k.jsonl")
    source = [{"kind": "instruct", "path": str(out / "gsm8k.jsonl"), "into": ["train"]}]
    shared = [f"data.sources={json.dumps(source)}", f"paths.data={out / 'data'}", f"paths.runs={out}", *args.set]
    config = load_config(CONFIG, shared)
    prepare_data(config)
    tokenize_data(config, load_tokenizer(config.model))
    print(
        "| convention | held-out accuracy | held-out loss | accuracy at rate 0.1 / 0.5 / 1.0 "
        "| tokens/s (median) | row tokens/s | minutes |"
    )
    print("|---|---|---|---|---|---|---|")
    for convention in ("shifted", "in_place"):
        run_config = load_config(CONFIG, [*shared, f"model.convention={convention}"])
        began = time.perf_counter()
        result = convert_wsd(run_config, convention)
        minutes = (time.perf_counter() - began) / 60
        lines = (Path(result["run"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [json.loads(line)["tokens_per_second"] for line in lines]
        steps = len(lines)
        tokens = statistics.median(rates)
        row_tokens = tokens * steps * run_config.train.rows_per_step * run_config.data.seq_len / result["tokens_seen"]
        checkpoint = run_config.model.model_copy(update={"base": result["checkpoint"], "dtype": "float32"})
        lm, _ = load_diffusion_lm(checkpoint)
        rows = open_rows(run_config, "eval", lm.tokenizer)
        assert rows is not None
        assert lm.block_size is not None
        found = evaluate_denoising(lm, rows, lm.block_size, EVAL_ROWS, run_config.train.micro_batch, every_rate=True)
        at = " / ".join(f"{found.by_rate[rate][1]:.3f}" for rate in (0.1, 0.5, 1.0))
        print(
            f"| {convention} | {found.accuracy:.3f} | {found.loss:.3f} | {at} | {tokens:.0f} | {row_tokens:.0f} "
            f"| {minutes:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
