"""Compares training recipes at an equal token budget, one change at a time, on SmolLM2-135M and GSM8K.

    python benchmarks/recipes.py --gsm8k path/to/gsm8k/train.jsonl                    # every recipe, seed 0
    python benchmarks/recipes.py --gsm8k ... --only base "1 row a step" --seeds 0 1 2

All recipes share rows, held-out rows, their noise and the number of training tokens. Results are stored in
docs/benchmarks/recipes.json, a stored run is not repeated, and docs/benchmarks/recipes.md is generated from them.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from results import machine, machines_line, spread, stored_runs

from hildanext.config import load_config
from hildanext.data.prepare import prepare_data
from hildanext.data.tokenize import tokenize_data
from hildanext.files import write_json
from hildanext.model.pretrained import load_tokenizer
from hildanext.model.self_answers import write_answers
from hildanext.training.convert import convert_wsd

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2-135m.json"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "recipes"
ROW, ROWS, TOKENS = 256, 4, 37888  # a third of the prototype's 112,640 tokens
HELD_OUT_ROWS = 40
PROTOTYPE = {"in_place": (0.389, 3.08), "shifted": (0.445, 2.77)}  # full, block 4, 112,640 tokens

LORA = {"lora.rank": 16, "train.lr": 1e-3}
LORA_64 = LORA | {"lora.rank": 64}
LADDER = {
    "wsd.shape": "ladder",
    "wsd.warmup_ladder": [1, 2],
    "wsd.decay_ladder": [4],
    "wsd.warmup_steps": 8,
    "wsd.stable_steps": 18,
}
M2T = {"noise.corrupt_rate": 0.0, "loss.w_t2t": 0.0}
FASTER, ELBO = {"train.lr": 6e-4}, {"loss.weighting": "elbo"}
# Name -> changes to "base": full fine-tuning, `shifted`, blocks of 4 from the first step, human answers.
RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "in_place": {"model.convention": "in_place"},
    "block ladder 1, 2, 4": LADDER,
    "lr 1e-4": {"train.lr": 1e-4},
    "lr 6e-4": FASTER,
    "lr 1e-3": {"train.lr": 1e-3},
    "2 rows a step": {"train.rows_per_step": 2},
    "1 row a step": {"train.rows_per_step": 1},
    "1/t weights (ELBO)": ELBO,
    "no wrong tokens": {"noise.corrupt_rate": 0.0},
    "M2T only": M2T,
    "complementary masks": {"noise.complementary": True},
    "multi-turn": {"noise.turns": 2},
    "CAP 0.1": {"loss.cap_weight": 0.1},
    "distilled, 0.5": {"loss.distill": 0.5},
    "distilled, 0.9": {"loss.distill": 0.9},
    "the base's answers": {"text": "self"},
    "half and half": {"text": "mix"},
    "the base's answers, distilled, 0.5": {"text": "self", "loss.distill": 0.5},
    "LoRA 16, lr 1e-3": LORA,
    "LoRA 16, lr 3e-3": LORA | {"train.lr": 3e-3},
    "LoRA 16, lr 6e-3": LORA | {"train.lr": 6e-3},
    "LoRA 64, lr 1e-3": LORA_64,
    "LoRA 64, lr 2e-3": LORA_64 | {"train.lr": 2e-3},
    "LoRA 64, distilled, 0.5": LORA_64 | {"loss.distill": 0.5},
    "LoRA 64, half and half": LORA_64 | {"text": "mix"},
    "LoRA 64, half and half, distilled, 0.5": LORA_64 | {"text": "mix", "loss.distill": 0.5},
    "LoRA 16, distilled, 0.5": LORA | {"loss.distill": 0.5},
    "LoRA 16, lr 3e-3, distilled, 0.5": LORA | {"train.lr": 3e-3, "loss.distill": 0.5},
    "lr 6e-4, M2T only": FASTER | M2T,
    "lr 6e-4, ladder": FASTER | LADDER,
    "lr 6e-4, ELBO": FASTER | ELBO,
}


def sources(text: str, questions: Path) -> list[dict[str, Any]]:
    human = {"kind": "instruct", "path": str(questions), "into": ["train"]}
    own = {"kind": "self", "path": str(questions), "into": ["train"], "max_documents": 512, "max_new_tokens": 200}
    if text == "mix":
        return [human | {"weight": 0.5, "max_documents": 512}, own | {"weight": 0.5}]
    return [human if text == "human" else own]


def overrides(recipe: dict[str, Any], out: Path, questions: Path, seed: int, tokens: int) -> list[str]:
    rows = recipe.get("train.rows_per_step", ROWS)
    steps = tokens // (ROW * rows)
    text = recipe.get("text", "human")
    keys: dict[str, Any] = {
        "paths.data": str(out / f"data-{text}"),
        "paths.runs": str(out / "runs"),
        "data.sources": sources(text, questions),
        "wsd.stable_steps": steps - steps * 3 // 10,
        "wsd.decay_steps": steps * 3 // 10,
        "train.seed": seed,
        "train.micro_batch": rows,
        "train.lr_warmup_steps": 6 * ROWS // rows,
        "train.eval_every": 0,
        "train.eval_rows": HELD_OUT_ROWS,
        "train.save_every": 1000,
        "train.keep_best": 0,
        "train.keep_last": 1,
    }
    keys |= {key: value for key, value in recipe.items() if key != "text"}
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def prepare(out: Path, questions: Path, text: str) -> None:
    """Prepare the rows of one kind of text, once and with seed 0. The held-out rows are always the human answers."""
    folder = out / f"data-{text}"
    if (folder / "ready").exists():
        return
    config = load_config(CONFIG, overrides({"text": text}, out, questions, 0, TOKENS))
    write_answers(config)
    prepare_data(config)
    if text != "human":
        prepare(out, questions, "human")
        shutil.copyfile(out / "data-human" / "processed" / "eval.jsonl", folder / "processed" / "eval.jsonl")
    tokenize_data(config, load_tokenizer(config.model))
    (folder / "ready").touch()


def measure(name: str, recipe: dict[str, Any], out: Path, questions: Path, seed: int, tokens: int) -> dict[str, Any]:
    prepare(out, questions, recipe.get("text", "human"))
    config = load_config(CONFIG, overrides(recipe, out, questions, seed, tokens))
    run = f"{len(list(out.glob('runs/*')))}-{seed}"
    began = time.perf_counter()
    result = convert_wsd(config, run)
    minutes = (time.perf_counter() - began) / 60
    lines = (Path(result["run"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["tokens_per_second"] for line in lines]
    shutil.rmtree(Path(result["run"]) / "checkpoints")
    return {
        "name": name,
        "seed": seed,
        "tokens": tokens,
        "recipe": recipe,
        "accuracy": result["eval_accuracy"],
        "loss": result["eval_loss"],
        "minutes": minutes,
        "text_tokens": result["tokens_seen"],
        "tokens_per_second": statistics.median(rates),
        "machine": machine(),
    }


def add(result: dict[str, Any]) -> None:
    """Add a result to the file and rewrite the page, under a lock because several processes may write."""
    file = PAGE.with_suffix(".json")
    folder = os.open(PAGE.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        write_json(file, [*stored_runs(PAGE), result])
        write_page(stored_runs(PAGE))
    finally:
        os.close(folder)


def write_page(results: list[dict[str, Any]]) -> None:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["tokens"], result["name"]), []).append(result)
    page = [
        "# Learning from few tokens",
        "",
        "Generated by `benchmarks/recipes.py`: SmolLM2-135M-Instruct, GSM8K in rows of 256,",
        "four rows per step, block size 4. The recipe *base* is full fine-tuning, `shifted`, blocks of 4 from the first",
        "step, learning rate 3e-4, uniform weights, one in ten observed tokens wrong, and human answers. Every other",
        f"recipe changes what its name says. Accuracy and loss (nats) are of masked tokens in {HELD_OUT_ROWS} held-out rows",
        "of human answers at mask rates 0.1 to 1.0, with fixed noise. Several seeds: mean and range.",
        "",
        "The prototype at 112,640 tokens: "
        + ", ".join(f"{accuracy} and {loss} (`{name}`)" for name, (accuracy, loss) in PROTOTYPE.items())
        + ".",
    ]
    for tokens in sorted({tokens for tokens, _ in groups}):
        page += [
            "",
            f"## {tokens:,} tokens",
            "",
            "| recipe | accuracy | loss | seeds | autocast |",
            "|---|---|---|---|---|",
        ]
        rows = [(name, runs) for (n, name), runs in groups.items() if n == tokens]
        for name, runs in sorted(rows, key=lambda row: -statistics.mean(run["accuracy"] for run in row[1])):
            runs = sorted(runs, key=lambda run: run["seed"])
            dtypes = ["bf16" if run["machine"]["bf16"] else "none" for run in runs]
            seeds = ", ".join(str(run["seed"]) for run in runs)
            page.append(
                f"| {name} | {spread([run['accuracy'] for run in runs], 3)} | {spread([run['loss'] for run in runs], 2)} | {seeds} "
                f"| {', '.join(dict.fromkeys(dtypes))} |"
            )
    page += [
        "",
        f"{machines_line(results)} Runs without autocast trained in fp32. The machine, threads and speed of each",
        "run are in [recipes.json](recipes.json).",
    ]
    PAGE.with_suffix(".md").write_text("\n".join(page) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    questions = args.out / "gsm8k.jsonl"
    shutil.copyfile(args.gsm8k, questions)
    for name in args.only:
        for seed in args.seeds:
            if any((run["name"], run["seed"], run["tokens"]) == (name, seed, args.tokens) for run in stored_runs(PAGE)):
                continue
            result = measure(name, RECIPES[name], args.out, questions, seed, args.tokens)
            add(result)
            print(f"{name}, seed {seed}: accuracy {result['accuracy']:.3f}, loss {result['loss']:.3f}", flush=True)


if __name__ == "__main__":
    main()
