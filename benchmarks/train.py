"""Training: speed and memory against a plain implementation, two processes against one, kill -9 in every command.

    make bench-train
    make bench-train ARGS="--only speed --stories path/to/stories.jsonl"
    make bench-train ARGS="--only gpu"          # needs a CUDA device

The plain implementation (plain.py) uses a dense [2L, 2L] mask for transformers' own attention and logits of all 2L
positions. Each part runs in its own process and, when it ends, updates docs/benchmarks/train.json and
docs/benchmarks/train.md, so parts may come from different machines. If a part fails, the others still run, the failed
part is named and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kills import kills
from plain import plain_loss, write_rows
from results import keep, machine
from train_gated import gated
from train_memory import SIDES, budget, memory, memory_side
from train_page import write_page
from transformers import PreTrainedTokenizerBase, Qwen3Config

from hildanext.config import Config, parse_config
from hildanext.data.rows import Rows, ShuffledRows
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import load_tokenizer
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.training.denoising import DenoisingTask, Recipe, noise_rows
from hildanext.training.optimizer import make_optimizer
from hildanext.training.parallel import start
from hildanext.training.run_folder import RunFolder
from hildanext.training.trainer import Trainer, TrainingJob

BLOCK, LENGTH = 32, 1024
QWEN3 = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
}


def qwen3(size: str) -> Qwen3Config:
    return Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **QWEN3[size])


def config_for(**sections: dict[str, Any]) -> Config:
    raw: dict[str, Any] = {
        "model": {"base": "smollm2-135m"},
        "data": {"seq_len": LENGTH},
        "wsd": {"start_block": BLOCK, "final_block": BLOCK, "peak_block": BLOCK},
        "train": {"rows_per_step": 1, "micro_batch": 1, "lr": 1e-4},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return parse_config(raw)


# Speed: complete steps of both implementations in turn


def our_side(config: Config, rows: Rows, folder: Path) -> tuple[Callable[[int], Any], DiffusionLM]:
    """HildaNext's trainer: (step -> metrics, model)."""
    lm, policy = load_diffusion_lm(config.model, training=True)
    recipe = Recipe(1, False, config.noise.t_min, config.noise.t_max, 0.0)
    job = TrainingJob("bench", 1000, lambda step: SchedulePoint("stable", BLOCK, config.train.lr), BLOCK)
    accelerator = start(policy, config.train)
    task = DenoisingTask(config, lm, accelerator, recipe, ShuffledRows(rows, 0), None, BLOCK)
    return Trainer(config, lm, policy, accelerator, job, task, RunFolder(folder / "unused")).train_step, lm


def plain_side(config: Config, rows: Rows) -> Callable[[int], float]:
    """The plain implementation with the same rows, noise and optimizer: step -> loss."""
    lm, policy = load_diffusion_lm(config.model, training=True)
    recipe = Recipe(1, False, config.noise.t_min, config.noise.t_max, 0.0)
    task = DenoisingTask(config, lm, start(policy, config.train), recipe, ShuffledRows(rows, 0), None, BLOCK)
    optimizer = make_optimizer(lm.model, config.train, policy.fused)
    lm.model.train()

    def step(number: int) -> float:
        batch = task.fetch([number])
        noisy = noise_rows(lm, batch, BLOCK, recipe, config.noise.corrupt_rate, config.train.seed)
        n_tokens, _ = task.counts([batch], BLOCK)
        with torch.autocast(lm.device.type, dtype=policy.compute, enabled=policy.compute != torch.float32):
            loss = plain_loss(lm, config, batch, noisy, BLOCK, n_tokens, policy.compute)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.model.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second of complete steps, on packed rows and on rows of one document each."""
    kinds: dict[str, Any] = {}
    config = config_for(model={"dtype": args.dtype, "device": "cpu"}, data={"seq_len": args.row})
    policy = choose_policy("cpu", args.dtype)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
    for name, packed in (("packed", True), ("one document", False)):
        place = folder / name.replace(" ", "-")
        about = write_rows(place, tokenizer, args.row, args.rounds + 1, args.stories, packed)
        rows = Rows.open(place)
        (ours, _), plain = our_side(config, rows, folder), plain_side(config, rows)
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        losses = []
        for number in range(args.rounds + 1):
            began = time.perf_counter()
            own = ours(number)["loss"]
            middle = time.perf_counter()
            other = plain(number)
            losses.append([own, other])
            times["ours"].append(middle - began)
            times["plain"].append(time.perf_counter() - middle)
            print(
                f"{name}, step {number}: {times['ours'][-1]:.1f} s, plain {times['plain'][-1]:.1f} s", file=sys.stderr
            )
        ratios = [b / a for a, b in zip(times["ours"][1:], times["plain"][1:], strict=True)]
        kinds[name] = about | {
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            **{f"{side}_tokens_per_second": args.row / statistics.median(each[1:]) for side, each in times.items()},
            "first_losses": losses[0],
        }
    dtype = str(policy.compute).removeprefix("torch.")
    return {"dtype": dtype, "reason": policy.reason, "row": args.row, "rounds": args.rounds, "kinds": kinds}


# Scaling: gloo processes through torchrun


def scaling(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second of a small Llama: one process on one core, two and four processes on two cores, in turn."""
    base = folder / "base"
    tokenizer = story_tokenizer(2000)
    tiny_llama(tokenizer, hidden=384, layers=8, context=512, seed=0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_rows(folder / "data" / "tokenized" / "train.rows", tokenizer, 512, 64, None, True)
    write_rows(folder / "data" / "tokenized" / "eval.rows", tokenizer, 512, 2, None, True)
    config = config_for(
        paths={"data": str(folder / "data"), "runs": str(folder / "runs")},
        model={"base": str(base), "device": "cpu", "dtype": "float32"},
        data={"seq_len": 512},
        wsd={"warmup_steps": 0, "stable_steps": 8, "decay_steps": 0},
        train={"rows_per_step": 8, "micro_batch": 2, "eval_every": 0, "eval_rows": 1, "save_every": 100},
    )
    file = folder / "config.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    program = ["hildanext.cli", "convert-wsd", "--config", str(file)]
    launch = {1: ["taskset", "-c", "0", sys.executable, "-m", *program]}
    for n in (2, 4):
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "--"]
        launch[n] = ["taskset", "-c", "0,1", sys.executable, "-m", *torchrun, *program]
    rates: dict[int, list[float]] = {n: [] for n in launch}
    losses: dict[int, list[float]] = {}
    for turn in range(args.turns):
        for n, launcher in launch.items():
            run = f"p{n}-{turn}"
            subprocess.run(
                [*launcher, "--run", run], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            lines = (folder / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            metrics = [json.loads(line) for line in lines]
            rates[n].append(statistics.median(row["tokens_per_second"] for row in metrics[1:-1]))
            losses[n] = [row["loss"] for row in metrics]
            print(f"{n} processes: {rates[n][-1]:.0f} tokens/s", file=sys.stderr)
    return {
        "one": statistics.median(rates[1]),
        "two": statistics.median(rates[2]),
        "four": statistics.median(rates[4]),
        "ratio": statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True)),
        "loss_difference": max(abs(a - b) for n in (2, 4) for a, b in zip(losses[1], losses[n], strict=True)),
        "turns": args.turns,
    }


def gpu(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Model FLOPs utilisation of the Qwen3-0.6B shape, FlexAttention against the dense mask, presets in 8 GB."""
    if not torch.cuda.is_available():
        return None
    from gpu import measure_gpu

    return measure_gpu(qwen3)


# Short parts first.
PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any] | None]] = {
    "budget": lambda args, folder: budget(qwen3, LENGTH),
    "kills": lambda args, folder: kills(args.kills, folder),
    "scaling": scaling,
    "speed": speed,
    "gated": lambda args, folder: gated(args, folder, config_for),
    "memory": memory,
    "gpu": gpu,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="speed: pairs of steps (default: 5)")
    parser.add_argument("--row", type=int, default=LENGTH, help=f"speed, memory: tokens in a row (default: {LENGTH})")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="speed, memory: compute format (default: HildaNext's choice for this CPU)",
    )
    parser.add_argument("--stories", type=Path, help="speed: JSONL file of stories (default: synthetic stories)")
    parser.add_argument("--turns", type=int, default=3, help="scaling: runs per launcher (default: 3)")
    parser.add_argument("--kills", type=int, default=20, help="kills: number of kills (default: 20)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument(
        "--results", type=Path, default=Path("docs/benchmarks/train.json"), help="file that keeps the numbers"
    )
    parser.add_argument(
        "--page", type=Path, default=Path("docs/benchmarks/train.md"), help="page made from the numbers"
    )
    return parser.parse_args()


def every_part() -> int:
    """Run each part in its own process with the same arguments. Returns 1 if a part failed."""
    failed = [part for part in PARTS if subprocess.run([sys.executable, *sys.argv, "--only", part]).returncode]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def one_part(args: argparse.Namespace) -> int:
    where = machine()
    with tempfile.TemporaryDirectory(prefix="bench-train-") as place:
        found = PARTS[args.only](args, Path(place))
    write_page(keep(args.results, args.only, found, where), args.page)
    if found is None:
        print(f"{args.only}: skipped, this machine cannot measure it", file=sys.stderr)
        return 0
    print(f"{args.only}: written to {args.page}")
    return int(found.get("identical") is False)


def main() -> int:
    args = parse_args()
    if args.side:
        config = config_for(
            model={"base": "Qwen/Qwen3-0.6B", "device": "cpu", "dtype": args.dtype},
            data={"seq_len": args.row},
            **SIDES[args.side],
        )
        print(json.dumps(memory_side(config, args.side, qwen3("0.6b"))))
        return 0
    return every_part() if args.only is None else one_part(args)


if __name__ == "__main__":
    sys.exit(main())
