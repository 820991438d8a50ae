"""Run a hildanext training under Ray Train, with one process per worker.

    python deploy/ray_train.py --workers 8 [--cpu] -- convert-wsd --config hildanext.json --run NAME

The arguments after `--` are those of the command line. Ray starts the workers and sets their ranks, as `torchrun` does.
All folders must be on storage that all nodes share, under the same paths. `--resume` continues a stopped run with any
number of workers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from hildanext import environment


def worker(config: dict[str, Any]) -> None:
    """Run the command in one worker. Ray has set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and the process group."""
    from hildanext.cli import main

    os.chdir(config["folder"])
    code = main(config["arguments"])
    if code:
        raise SystemExit(f"hildanext ended with exit code {code}; the error is in the worker's log")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="number of processes, one per GPU")
    parser.add_argument("--cpu", action="store_true", help="run on CPUs, with the gloo backend")
    args = parser.parse_args(sys.argv[1:split])
    arguments = sys.argv[split + 1 :]
    if not arguments:
        parser.error("give the hildanext command after --")
    environment.prepare()
    # Importing torch from cold shared storage can exceed Ray's default of a minute, after which workers restart.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    trainer = TorchTrainer(
        worker,
        train_loop_config={"arguments": arguments, "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
        torch_config=TorchConfig(backend="gloo" if args.cpu else "nccl"),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
