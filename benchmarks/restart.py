"""What a checkpoint and a resume cost: seconds for each GB, with a random Llama and AdamW's state, in one process.

    python benchmarks/restart.py [--hidden 768] [--layers 8] [--turns 3]

Prints one JSON object. `docs/launch.md` multiplies these figures for larger models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from plain import write_rows
from results import machine
from train import BLOCK, config_for

from hildanext.config import Config
from hildanext.data.rows import Rows, ShuffledRows
from hildanext.diffusion.schedule import SchedulePoint
from hildanext.model.loading import load_diffusion_lm
from hildanext.model.tiny import story_tokenizer, tiny_llama
from hildanext.training.checkpoint import newest_good
from hildanext.training.denoising import DenoisingTask, Recipe
from hildanext.training.parallel import start
from hildanext.training.run_folder import RunFolder
from hildanext.training.trainer import State, Trainer, TrainingJob


def trainer_of(config: Config, rows: Rows, run: RunFolder) -> Trainer:
    lm, policy = load_diffusion_lm(config.model, training=True)
    recipe = Recipe(1, False, config.noise.t_min, config.noise.t_max, 0.0)
    job = TrainingJob("bench", 1000, lambda step: SchedulePoint("stable", BLOCK, config.train.lr), BLOCK)
    accelerator = start(policy, config.train)
    task = DenoisingTask(config, lm, accelerator, recipe, ShuffledRows(rows, 0), None, BLOCK)
    return Trainer(config, lm, policy, accelerator, job, task, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    saved, resumed = [], []
    with tempfile.TemporaryDirectory(prefix="bench-restart-") as place:
        folder = Path(place)
        tokenizer = story_tokenizer(2000)
        model = tiny_llama(tokenizer, hidden=args.hidden, layers=args.layers, context=512, seed=0)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        del model
        write_rows(folder / "rows", tokenizer, 128, 4, None, True)
        rows, run = Rows.open(folder / "rows"), RunFolder(folder / "run")
        run.checkpoints.mkdir(parents=True)
        sections = {
            "data": {"seq_len": 128},
            "model": {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"},
        }
        trainer = trainer_of(config_for(**sections), rows, run)
        for turn in range(1, args.turns + 1):
            trainer.train_step(turn)
            began = time.perf_counter()
            trainer.save(State(turn, 0, {}))
            saved.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in (run.checkpoints / f"step-{args.turns}").iterdir()) / 1e9
        del trainer
        for _ in range(args.turns):
            began = time.perf_counter()
            found = newest_good(run.checkpoints)
            assert found is not None
            source = {"model": sections["model"] | {"base": str(found[0])}}
            trainer_of(config_for(**sections | source), rows, run).restore(found[0], found[1])
            resumed.append(time.perf_counter() - began)
    print(
        json.dumps(
            {
                "parameters": n_parameters,
                "checkpoint_gb": size,
                "save_seconds": saved,
                "save_seconds_per_gb": statistics.median(saved) / size,
                "resume_seconds": resumed,
                "resume_seconds_per_gb": statistics.median(resumed) / size,
                "machine": machine(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
