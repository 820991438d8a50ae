"""Peak memory of a training step, for train.py. Each side runs in its own process, which alone ends if memory is short."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from train_gated import KINDS
from transformers import Qwen3Config

from hildanext.config import Config, apply_overrides, parse_config
from hildanext.model.policy import Policy, choose_policy
from hildanext.training.footprint import measure, peak_of, predict, start_peak
from hildanext.training.optimizer import make_optimizer
from hildanext.training.preflight import policy_of
from hildanext.training.worst_case import build, worst_rows

RESERVED = 500_000_000  # bytes of free memory that are left to other processes
SMALL = {"gradient_checkpointing": True}
SIDES: dict[str, dict[str, Any]] = {
    "plain": {"train": {"attention": "dense"}},
    "ours": {},
    "ours, checkpointing": {"train": SMALL},
    "ours, checkpointing and 8-bit AdamW": {"train": SMALL | {"optimizer": "adamw8bit"}},
    "ours, checkpointing and Adafactor": {"train": SMALL | {"optimizer": "adafactor"}},
    "ours, LoRA of rank 16": {"lora": {"rank": 16}},
    "ours, LoRA of rank 16, blocks of 4": KINDS["adapter"],
    "ours, gated, groups of 4": KINDS["gated"],
}


def memory_side(config: Config, side: str, shape: Qwen3Config) -> dict[str, Any]:
    """Measured and predicted peak of three steps of a shape with random weights. Fails cleanly if memory is short."""
    die_first()
    policy = choose_policy("cpu", config.model.dtype)
    if side == "plain":
        return {"peak": plain_memory(config, policy, shape), "predicted": None}
    predicted = predict(config, "convert-wsd", policy, shape).total
    return {"peak": measure(config, "convert-wsd", policy, shape), "predicted": predicted}


def die_first() -> None:
    """Limit allocations to free memory, and make the kernel kill this process first if memory runs out anyway."""
    if sys.platform != "linux":
        return
    most = int(psutil.virtual_memory().available + psutil.Process().memory_info().rss) - RESERVED
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    Path("/proc/self/oom_score_adj").write_text("1000")


def plain_memory(config: Config, policy: Policy, shape: Qwen3Config) -> int:
    """Three plain steps: dense mask, fp32 logits of 2L positions, AdamW."""
    rows = worst_rows(config, "convert-wsd", policy, shape, policy.device)
    start_peak(policy.device)
    model = build(shape, config, policy)
    optimizer = make_optimizer(model, config.train, policy.fused)
    labels = torch.full(rows.ids.shape, -100)
    labels[rows.places] = rows.labels
    for _ in range(3):
        with torch.autocast("cpu", dtype=policy.compute, enabled=policy.compute != torch.float32):
            logits = model(
                input_ids=rows.ids, attention_mask=rows.visible, position_ids=rows.position_ids, use_cache=False
            ).logits.float()
            ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        del logits
        ce.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_of(policy.device)


def short_of_memory(code: int, errors: str) -> bool:
    """Whether a process ended because memory ran out: by SIGKILL or by a failed allocation."""
    return code == -signal.SIGKILL or "alloc" in errors or "MemoryError" in errors


def measured(command: list[str]) -> dict[str, Any]:
    """Run a side and return what it prints. If it ran out of memory, `more_than` is the most it used.

    Raises RuntimeError for any other failure.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        messages = errors.read()
        if process.returncode == 0:
            found: dict[str, Any] = json.loads(out.read().splitlines()[-1])
            return found
    if not short_of_memory(process.returncode, messages):
        raise RuntimeError(f"{command[-1]}: {messages.splitlines()[-1] if messages else process.returncode}")
    return {"peak": None, "more_than": usage.ru_maxrss * 1024, "predicted": None}


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measured and predicted peaks of all sides."""
    found: dict[str, Any] = {}
    dtype = args.dtype if args.dtype != "auto" else str(choose_policy("cpu").compute).removeprefix("torch.")
    for side in SIDES:
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--row", str(args.row)]
        found[side] = measured([*command, "--dtype", dtype, "--side", side])
        print(f"{side}: {found[side]}", file=sys.stderr)
    return {"dtype": dtype, "row": args.row, "sides": found}


def budget(qwen3: Callable[[str], Qwen3Config], length: int) -> dict[str, Any]:
    """Predicted peaks on 8 GB cards: full training of the 0.6B shape, an adapter for the 1.7B shape."""
    configs = Path(__file__).parents[1] / "configs"
    found = {}
    for preset, size in (("qwen3-0.6b-gtx1080", "0.6b"), ("qwen3-1.7b-lora-8gb", "1.7b")):
        raw = json.loads((configs / f"{preset}.json").read_text(encoding="utf-8"))
        config = parse_config(apply_overrides(raw, [f"data.seq_len={length}"]))
        for card in ("sm_61", "sm_80"):
            peak = predict(config, "convert-wsd", policy_of(config.model, card), qwen3(size))
            found[f"{preset} on {card}"] = {**peak._asdict(), "total": peak.total}
    return {"cards": found}
