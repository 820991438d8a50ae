"""Gated training against an adapter that changes every token, for train.py: supervised rows per second, peak memory."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plain import write_rows
from transformers import PreTrainedTokenizerBase

from hildanext.config import Config
from hildanext.data.rows import Rows, ShuffledRows
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import load_tokenizer
from hildanext.training.denoising import DenoisingTask, Recipe
from hildanext.training.gated import GatedTask, GroupRecipe
from hildanext.training.parallel import start
from hildanext.training.run_folder import RunFolder
from hildanext.training.trainer import Trainer, TrainingJob

BLOCK = 4
SECTIONS: dict[str, Any] = {
    "wsd": {"start_block": BLOCK, "peak_block": BLOCK, "final_block": BLOCK},
    "train": {"rows_per_step": 1, "micro_batch": 1, "lr": 1e-4},
}
# A row of 1,024 has 256 groups of 4, so that as many rows are denoised as in blocks.
KINDS: dict[str, dict[str, Any]] = {
    "adapter": SECTIONS | {"lora": {"rank": 16}},
    "gated": SECTIONS | {"lora": {"rank": 16, "gate": True, "draft_head": 512}, "noise": {"anchors": 256}},
}


class Side:
    """A trainer whose steps are timed; `rows` are those with a loss, masked or wrong."""

    def __init__(self, config: Config, rows: Rows, folder: Path) -> None:
        lm, policy = load_diffusion_lm(config.model, training=True, lora=config.lora)
        accelerator, noise = start(policy, config.train), config.noise
        source = ShuffledRows(rows, 0)
        self.task: GatedTask | DenoisingTask
        if config.lora.gate:
            groups = GroupRecipe(noise, noise.t_min, noise.t_max, False)
            self.task = GatedTask(config, lm, accelerator, groups, source, None, BLOCK)
        else:
            recipe = Recipe(1, False, noise.t_min, noise.t_max, 0.0)
            self.task = DenoisingTask(config, lm, accelerator, recipe, source, None, BLOCK)
        job = TrainingJob("bench", 1000, lambda step: SchedulePoint("stable", BLOCK, config.train.lr), BLOCK)
        self.trainer = Trainer(config, lm, policy, accelerator, job, self.task, RunFolder(folder / "unused"))
        self.rows = 0.0
        logged = self.task.metrics

        def count(total: dict[str, float]) -> dict[str, float]:
            self.rows = total["masked"] + total["corrupted"]
            return logged(total)

        self.task.metrics = count  # type: ignore[method-assign]

    def rate(self, step: int) -> float:
        """Supervised rows per second of a complete step."""
        began = time.perf_counter()
        self.trainer.train_step(step)
        return self.rows / (time.perf_counter() - began)


def gated(args: argparse.Namespace, folder: Path, config_for: Callable[..., Config]) -> dict[str, Any]:
    """Supervised rows per second of SmolLM2-135M, steps of both sides in turn."""
    configs = {
        name: config_for(model={"dtype": args.dtype, "device": "cpu"}, data={"seq_len": args.row}, **sections)
        for name, sections in KINDS.items()
    }
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(configs["gated"].model)
    write_rows(folder / "rows", tokenizer, args.row, args.rounds + 1, args.stories, True)
    sides = {name: Side(config, Rows.open(folder / "rows"), folder) for name, config in configs.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(args.rounds + 1):
        for name, side in sides.items():
            rates[name].append(side.rate(step))
            print(f"{name}, step {step}: {rates[name][-1]:.0f} supervised rows/s", file=sys.stderr)
    ratios = [a / b for a, b in zip(rates["gated"][1:], rates["adapter"][1:], strict=True)]
    policy = choose_policy("cpu", args.dtype)
    return {
        "dtype": str(policy.compute).removeprefix("torch."),
        "row": args.row,
        "rounds": args.rounds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "rows_per_second": {name: statistics.median(each[1:]) for name, each in rates.items()},
    }
