"""A hildanext training under Ray Train: one process a worker, the command line's own arguments.

    python deploy/ray_train.py --workers 8 [--cpu] -- convert-wsd --config hildanext.json --run NAME

Ray starts the workers and tells each who it is; everything else is what `torchrun` would do. Folders must be on storage that
all nodes share, under the same paths. A run that was stopped goes on with `--resume`, with any number of workers.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def worker(config: dict[str, Any]) -> None:
    """Ray has set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and joined the process group."""
    from hildanext.cli import main

    os.chdir(config["folder"])
    code = main(config["arguments"])
    if code:
        raise SystemExit(f"hildanext ended with {code}; its one-line reason is in the worker's log")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="processes, one a GPU")
    parser.add_argument("--cpu", action="store_true", help="without GPUs, over gloo")
    args = parser.parse_args(sys.argv[1:split])
    arguments = sys.argv[split + 1 :]
    if not arguments:
        parser.error("give the hildanext command after --")
    # Workers import torch, from shared storage when cold: after Ray's own minute it would begin with them again, without end.
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
