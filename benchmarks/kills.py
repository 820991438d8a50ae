"""kill -9 at random moments of every command. Restarted commands must give the weights of an undisturbed run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hildanext.data.synthetic import synthetic_instructions
from hildanext.model.tiny import story_tokenizer, tiny_llama

COMMANDS = ("prepare-data", "tokenize", "convert-wsd", "sft", "merge-topk")
NAMES = {"convert-wsd": "convert", "sft": "sft"}  # names of the runs that can be resumed
OUTPUTS = {
    "prepare-data": "data",
    "tokenize": "data/tokenized",
    "convert-wsd": "runs/convert",
    "sft": "runs/sft",
    "merge-topk": "runs/sft/merged",
}


def write_material(folder: Path) -> None:
    """Write a tiny AR base, instructions, prompts for it to answer, and the configuration of all commands."""
    tokenizer = story_tokenizer()
    tiny_llama(tokenizer, hidden=64, layers=2, context=256, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [json.dumps(record) + "\n" for record in synthetic_instructions(600, seed=2)]
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


class Struck(NamedTuple):
    """Result of running a command."""

    seconds: float
    began: float | None  # seconds until it first wrote something; before that it imports, loads and checks
    killed: bool
    torn: bool  # killed while a file was half written


class Moment(NamedTuple):
    """When to kill: `seconds` after the start or the first write, or at the first half-written file after that."""

    phase: Literal["starting", "working", "saving"]
    seconds: float

    def has_come(self, now: float, began: float | None, half: bool) -> bool:
        if self.phase == "starting":
            return now >= self.seconds
        at_work = began is not None and now - began >= self.seconds
        return at_work and (half or self.phase == "working")


Entry = tuple[str, int, int]  # path, inode, time of its last change


def files_of(folder: Path) -> set[Entry]:
    """All output files of the commands, including temporary files that are still being written."""
    found = set()
    for place in ("data", "runs"):
        for parent, folders, files in os.walk(folder / place):
            for name in (*folders, *files):
                with contextlib.suppress(FileNotFoundError):
                    about = os.lstat(path := os.path.join(parent, name))
                    found.add((path, about.st_ino, about.st_mtime_ns))
    return found


def half_written(entries: set[Entry]) -> bool:
    return any(name.startswith(".") and "tmp" in name for path, _, _ in entries for name in path.split(os.sep))


def run(folder: Path, command: str, resume: bool = False, moment: Moment | None = None) -> Struck:
    """Run a command and kill it at `moment` if it still runs. Raises RuntimeError if it fails by itself."""
    before = files_of(folder)
    started, began = time.monotonic(), None
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            arguments(command, resume), cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        while process.poll() is None:
            now = time.monotonic() - started
            found = files_of(folder)
            if began is None and found != before:
                began = now
            if moment is not None and moment.has_come(now, began, half_written(found - before)):
                process.kill()
                process.wait()
            time.sleep(0.001)
        seconds = time.monotonic() - started
        errors.seek(0)
        messages = errors.read()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{command}: {messages.splitlines()[-1] if messages else process.returncode}")
    killed = process.returncode != 0
    return Struck(seconds, began, killed, killed and half_written(files_of(folder) - before))


PHASES: tuple[Literal["starting", "working", "saving"], ...] = ("working", "saving", "working", "starting")


def moment_for(number: int, usual: Struck, rng: random.Random) -> Moment:
    """A random moment for the `number`th kill of a command, during its work more often than during its start.

    usual: the undisturbed run of the command.
    """
    phase = PHASES[number % len(PHASES)]
    began = usual.seconds if usual.began is None else usual.began
    if phase == "starting":
        return Moment(phase, rng.uniform(0.0, began))
    share = 0.95 if phase == "working" else 0.5
    return Moment(phase, rng.uniform(0.0, share * (usual.seconds - began)))


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that kills must not change: rows, text and merged weights."""
    names = [
        *sorted((folder / "data").rglob("*.safetensors")),
        *sorted((folder / "data").rglob("*.jsonl")),
        folder / "runs" / "sft" / "merged" / "model.safetensors",
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def kills(n: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run all commands undisturbed, then again with `n` kills at random moments, spread over the commands."""
    write_material(folder)
    undisturbed = folder / "undisturbed"
    shutil.copytree(folder, undisturbed, ignore=shutil.ignore_patterns("undisturbed"))
    usual = {command: run(undisturbed, command) for command in COMMANDS}
    rng = random.Random(seed)
    struck: list[dict[str, Any]] = []
    for place, command in enumerate(COMMANDS):
        struck += strike(folder, command, n // len(COMMANDS) + (place < n % len(COMMANDS)), usual[command], rng)
    same = digest(folder) == digest(undisturbed)
    seconds = {command: undisturbed_run.seconds for command, undisturbed_run in usual.items()}
    return {"kills": len(struck), "struck": struck, "seconds": seconds, "identical": same}


def strike(folder: Path, command: str, wanted: int, usual: Struck, rng: random.Random) -> list[dict[str, Any]]:
    """Kill a command `wanted` times, restarting it each time, then let it finish."""
    struck: list[dict[str, Any]] = []
    done = False
    while len(struck) < wanted or not done:
        moment = moment_for(len(struck), usual, rng) if len(struck) < wanted else None
        resume = (folder / "runs" / NAMES.get(command, "-") / "config.json").exists()
        found = run(folder, command, resume, moment)
        done = not found.killed
        if found.killed and moment is not None:
            phase = "saving" if found.torn else "starting" if found.began is None else "working"
            left = _state(folder, command)
            struck.append({"command": command, "after": found.seconds, "phase": phase, "left": left})
            print(f"{command}: killed after {found.seconds:.1f} s ({phase}), {left}", file=sys.stderr)
            if command == "merge-topk" and (folder / OUTPUTS[command]).exists():
                done = True  # killed while it evaluated the merged checkpoint
        if done and len(struck) < wanted:  # it finished before the kill: run it again from the beginning
            done = False
            shutil.rmtree(folder / OUTPUTS[command])
    return struck


def _state(folder: Path, command: str) -> str:
    """The progress that a killed command left behind, in a few words."""
    if command == "prepare-data":
        written = folder / "data" / "self" / "prompts.jsonl"
        return f"{len(written.read_bytes().splitlines()) if written.exists() else 0} answers written"
    if command == "tokenize":
        return f"{len(list((folder / 'data').rglob('*.safetensors')))} shards written"
    if command == "merge-topk":
        return "merged" if (folder / OUTPUTS[command]).exists() else "nothing merged"
    metrics = folder / "runs" / NAMES[command] / "metrics.jsonl"
    return f"{len(metrics.read_bytes().splitlines()) if metrics.exists() else 0} steps logged"
