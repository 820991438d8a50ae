"""kill -9 at random moments of every command, on a tiny model; whatever was killed goes on, to the weights of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hildanext.synthetic import synthetic_instructions
from hildanext.tiny import story_tokenizer, tiny_llama

COMMANDS = ("prepare-data", "tokenize", "convert-wsd", "sft", "merge-topk")
NAMES = {"convert-wsd": "convert", "sft": "sft"}  # of the runs that can be resumed
OUTPUTS = {
    "prepare-data": "data",
    "tokenize": "data/tokenized",
    "convert-wsd": "runs/convert",
    "sft": "runs/sft",
    "merge-topk": "runs/sft/merged",
}


def write_material(folder: Path) -> None:
    """A tiny AR base, instructions, prompts for it to answer, and the configuration of the whole way."""
    tokenizer = story_tokenizer()
    tiny_llama(tokenizer, hidden=64, layers=2, context=256, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [json.dumps(one) + "\n" for one in synthetic_instructions(600, seed=2)]
    (folder / "instructions.jsonl").write_text("".join(lines), encoding="utf-8")
    prompts = [f"Tell a story about {name} number {n}." for n in range(100) for name in ("Mia", "Leo")]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    config = {
        "paths": {"data": "data", "runs": "runs"},
        "model": {"base": "base", "device": "cpu", "dtype": "float32"},
        "data": {
            "sources": [
                {"kind": "tinystories", "documents": 3000},
                {"kind": "instruct", "path": "instructions.jsonl"},
                {"kind": "self", "path": "prompts.txt", "max_new_tokens": 24, "batch": 8, "into": ["train", "sft"]},
            ],
            "seq_len": 96,
            "shard_mb": 0.2,
            "eval_share": 0.05,
        },
        "wsd": {"warmup_steps": 20, "stable_steps": 20, "decay_steps": 20, "peak_block": 16, "final_block": 8},
        "train": {
            "rows_per_step": 8,
            "micro_batch": 4,
            "eval_every": 5,
            "eval_rows": 8,
            "save_every": 5,
            "keep_best": 2,
        },
        "sft": {"steps": 40, "turns": 2},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def arguments(command: str, resume: bool) -> list[str]:
    extra: dict[str, list[str]] = {
        "sft": ["--model", "runs/convert/checkpoints/step-60"],
        "merge-topk": ["--run", "sft", "--k", "2", "--split", "sft_eval"],
    }
    again = ["--resume"] if resume and command in ("convert-wsd", "sft") else []
    return [sys.executable, "-m", "hildanext.cli", command, "--config", "config.json", *extra.get(command, []), *again]


def run(folder: Path, command: str, resume: bool = False, kill_after: float | None = None) -> tuple[float, bool]:
    """(seconds, whether it was killed). Raises RuntimeError for a command that failed by itself."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments(command, resume),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{command}: {errors.splitlines()[-1] if errors else process.returncode}")
    return time.monotonic() - began, process.returncode != 0


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of what must not depend on the disturbance: rows, text and merged weights."""
    names = [
        *sorted((folder / "data").rglob("*.safetensors")),
        *sorted((folder / "data").rglob("*.jsonl")),
        folder / "runs" / "sft" / "merged" / "model.safetensors",
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def kills(n: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """The whole way undisturbed, then again with `n` kills spread over its commands, each at a random moment."""
    write_material(folder)
    undisturbed = folder / "undisturbed"
    shutil.copytree(folder, undisturbed, ignore=shutil.ignore_patterns("undisturbed"))
    seconds = {command: run(undisturbed, command)[0] for command in COMMANDS}
    rng = random.Random(seed)
    struck: list[dict[str, Any]] = []
    for place, command in enumerate(COMMANDS):
        wanted = n // len(COMMANDS) + (place < n % len(COMMANDS))
        longest, done = seconds[command], False
        while wanted or not done:
            # Python imports for more than half of it; a command that was killed before has less to do than an undisturbed one.
            after = rng.uniform(0.65, 0.98) * longest if wanted else None
            resume = (folder / "runs" / NAMES.get(command, "-") / "config.json").exists()
            took, killed = run(folder, command, resume, after)
            done = not killed
            if killed:
                wanted -= 1
                struck.append({"command": command, "after": took, "left": _state(folder, command)})
                print(f"{command}: killed after {took:.1f} s, {struck[-1]['left']}", file=sys.stderr)
                if command == "merge-topk" and (folder / OUTPUTS[command]).exists():
                    done = True  # it was killed while it judged the result
            if done and wanted:  # sooner than the kill: from the beginning
                longest, done = min(longest, took), False
                shutil.rmtree(folder / OUTPUTS[command])
    same = digest(folder) == digest(undisturbed)
    return {"kills": len(struck), "struck": struck, "seconds": seconds, "identical": same}


def _state(folder: Path, command: str) -> str:
    """What a killed command left behind, in a few words."""
    if command == "prepare-data":
        written = folder / "data" / "self" / "prompts.jsonl"
        return f"{len(written.read_bytes().splitlines()) if written.exists() else 0} answers written"
    if command == "tokenize":
        return f"{len(list((folder / 'data').rglob('*.safetensors')))} shards written"
    if command == "merge-topk":
        return "merged" if (folder / OUTPUTS[command]).exists() else "nothing merged"
    metrics = folder / "runs" / NAMES[command] / "metrics.jsonl"
    return f"{len(metrics.read_bytes().splitlines()) if metrics.exists() else 0} steps logged"
