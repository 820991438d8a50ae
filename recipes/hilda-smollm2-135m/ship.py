"""Copy a merged and calibrated adapter into the package, with the records of the runs that made it.

python recipes/hilda-smollm2-135m/ship.py --merged runs/merged --runs runs/convert runs/sft
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from hildanext.config import SHIPPED_MODEL
from hildanext.files import write_json
from hildanext.model.pretrained import MODELS
from hildanext.training.run_folder import RunFolder

KEPT = (
    "model",
    "data",
    "noise",
    "loss",
    "lora",
    "train",
)  # sections of a run's configuration to keep, besides the command's own
CURVE = ("step", "tokens_seen", "lr", "loss", "eval_loss", "eval_accuracy")


def record(run: RunFolder) -> dict[str, Any]:
    """A run's command, configuration, versions and size, and its held-out curve."""
    about = json.loads(run.record.read_text(encoding="utf-8"))
    config, command = about["config"], about["command"]
    rows = run.read_metrics()
    own = "wsd" if command == "convert-wsd" else command
    return {
        "command": command,
        "seed": about["seed"],
        "config": {key: config[key] for key in (*KEPT, own)},
        "versions": about["versions"],
        "git": about["git"],
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens_seen"],
        "curve": [{key: row[key] for key in CURVE} for row in rows if "eval_loss" in row],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merged", type=Path, required=True, help="folder written by merge-topk and calibrated")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="the training runs behind it, in order")
    parser.add_argument("--out", type=Path, default=MODELS / SHIPPED_MODEL)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.merged.iterdir()):
        if path.is_file():
            shutil.copyfile(path, args.out / path.name)
    write_json(args.out / "training.json", {"runs": [record(RunFolder(run)) for run in args.runs]})
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.1f} MB; update its README.md next")


if __name__ == "__main__":
    main()
