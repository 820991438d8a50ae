"""Make hilda-smollm2-135m: prompts, the base's answers to them, training in parts, the package's folder.

    python recipes/hilda-smollm2-135m/ship.py        # or: make ship

Everything is kept in runs/ship. A killed run continues where it was: answers by batch, training from its last
checkpoint; a finished part is not repeated. The base's stored answers beside this file are used; without them they are
written anew.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import runpy
import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from hildanext.config import SHIPPED_MODEL, Config, LoraConfig, load_config
from hildanext.data.prepare import prepare_data
from hildanext.data.sources.self_answers import written_file
from hildanext.data.tokenize import tokenize_data
from hildanext.decoding.settings import Preset
from hildanext.files import write_json
from hildanext.model.adapter_file import SETTINGS, WEIGHTS, LoraFactors, read_adapter, write_adapter
from hildanext.model.low_rank import LowRank
from hildanext.model.pretrained import MODELS, load_tokenizer
from hildanext.model.self_answers import write_answers
from hildanext.progress import say
from hildanext.training.convert import sft
from hildanext.training.merge import merge
from hildanext.training.run_folder import RunFolder

RECIPE = Path(__file__).parent
# Files of prompts: (world, count, prompts of this world that are left out before).
PROMPTS = {
    "prompts": [("first", 1344, 0), ("first", 3000, 1700)],
    "wide": [("wide", 2400, 0)],
    "work": [("work", 900, 0)],
    "first-sampled": [("first", 1200, 6000)],
    "wide-sampled": [("wide", 600, 4000)],
    "work-sampled": [("work", 200, 2000)],
}
# Rows of a pass and tau_accept; docs/LOG.md and the model's card say how they were chosen.
PRESETS = {
    "EXACT": Preset(0.7, 0.5, tau_accept=1.0, rows=8),
    "Q_MODE": Preset(0.7, 0.5, tau_accept=0.6, rows=12),
    "S_MODE": Preset(0.5, 0.0, tau_accept=0.25, rows=16),
}
FALLING = {"sft.lr_decay_share": 1.0, "train.lr_final_ratio": 0.02}
OUTPUTS = {"lora.targets": ["o_proj", "down_proj"], "lora.rank": 32}
SIX_ROWS = {"sft.lr": 1.5e-3, "sft.block_size": 6, "noise.anchors": 48}
# Parts of the training, each from the adapter of the part before: the rate is constant, then it falls.
PARTS: dict[str, dict[str, Any]] = {
    "first": {"sources": 2, "train.seed": 0, "sft.steps": 800, "sft.lr_decay_share": 0.0},
    "second": {
        "sources": 3,
        "train.seed": 1,
        "sft.steps": 700,
        "sft.lr_decay_share": 0.6,
        "train.lr_final_ratio": 0.03,
    },
    "third": SIX_ROWS | {"sources": 3, "train.seed": 2, "sft.steps": 450, "sft.lr_decay_share": 0.0},
    "fourth": SIX_ROWS | FALLING | {"sources": 6, "train.seed": 3, "sft.steps": 780},
    "fifth": SIX_ROWS
    | FALLING
    | {
        "sources": 6,
        "train.seed": 4,
        "noise.anchors": 64,
        "noise.offset_keep": 0.8,  # groups of 1 to 6 rows, as passes of few rows have them
        "sft.steps": 130,
        "sft.lr": 4e-4,
    },
    # Only the output projections from here: half of the gate's products in a pass, which is 8 % of its time.
    "sixth": SIX_ROWS
    | FALLING
    | OUTPUTS
    | {"sources": 6, "train.seed": 5, "noise.anchors": 56, "noise.offset_keep": 0.9, "sft.steps": 540},
    "seventh": SIX_ROWS
    | FALLING
    | OUTPUTS
    | {
        "sources": 6,
        "train.seed": 6,
        "noise.anchors": 56,
        "noise.offset_keep": 0.9,
        "sft.steps": 500,
        "sft.lr": 1.3e-3,
    },
}
CURVE = ("step", "tokens_seen", "lr", "loss", "eval_loss", "eval_accuracy", "eval_run")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Relative paths of the configuration are those of `folder`: the base's answers are stored under such a path."""
    folder.mkdir(parents=True, exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def part_config(part: str) -> Config:
    """The configuration of one part of the training, with its own data folder."""
    changes = {"paths.data": f"data-{part}", "paths.runs": "runs"} | PARTS[part]
    n_sources = changes.pop("sources")
    config = load_config(RECIPE / "config.json", [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    return config.model_copy(
        update={"data": config.data.model_copy(update={"sources": config.data.sources[:n_sources]})}
    )


def write_prompts(folder: Path) -> None:
    take = runpy.run_path(str(RECIPE / "prompts.py"))["take"]
    for name, parts in PROMPTS.items():
        lines = [prompt for world, count, skip in parts for prompt in take(world, count, skip=skip)]
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def place_answers(config: Config) -> None:
    """Put the base's stored answers where its sources look for them, by the name of their prompts' file."""
    for source in config.data.sources:
        file = written_file(config.paths.data, source)
        stored = RECIPE / f"{file.stem.rpartition('-')[0]}-answers.jsonl.gz"
        if stored.exists() and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.decompress(stored.read_bytes()))
            shutil.copyfile(
                stored.with_name(stored.name.removesuffix(".jsonl.gz") + ".json"), file.with_suffix(".json")
            )


def prepare(config: Config) -> None:
    """Prepare the rows of one part, once."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": 0})})  # of the stored answers
    ready = Path(config.paths.data) / "ready"
    if ready.exists():
        return
    place_answers(config)
    write_answers(config)
    prepare_data(config)
    tokenize_data(config, load_tokenizer(config.model))
    ready.touch()


def narrow(checkpoint: Path, folder: Path, lora: LoraConfig) -> None:
    """Copy an adapter to `folder` without the layers that `lora` leaves out, its other factors grown to the rank of `lora`.

    The new ranks are those of a new adapter, so the changes of the layers that stay are the same.
    """
    adapter, settings = read_adapter(checkpoint / WEIGHTS, checkpoint / SETTINGS)
    assert lora.rank is not None
    assert isinstance(lora.targets, list)
    torch.manual_seed(0)
    pairs = {}
    for name, (a, b) in adapter.pairs.items():
        if name.rpartition(".")[2] in lora.targets:
            new = LowRank(lora.rank - adapter.rank, a.shape[1], b.shape[0], adapter.scaling)
            pairs[name] = LoraFactors(torch.cat([a, new.A.detach()]), torch.cat([b, new.B.detach()], dim=1))
    vocabulary = [*settings["rank_pattern"]]
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    write_adapter(folder, adapter._replace(pairs=pairs), settings | {"target_modules": [*lora.targets, *vocabulary]})


def train() -> str:
    """Train the parts in turn. Returns the last checkpoint."""
    base = lora = None
    for part in PARTS:
        config = part_config(part)
        prepare(config)
        if base is not None and config.lora != lora:
            narrow(Path(base), Path("narrowed"), config.lora)
            base = "narrowed"
        lora = config.lora
        if base is not None:
            config = config.model_copy(update={"model": config.model.model_copy(update={"base": base})})
        done = sft(config, part, resume=RunFolder(Path("runs") / part).record.is_file())
        if not done["finished"]:
            raise SystemExit(f"stopped after step {done['steps']} of part '{part}'; run the same command to continue")
        base = done["checkpoint"]
    assert base is not None
    return base


def record(run: RunFolder) -> dict[str, Any]:
    """A run's configuration, versions and size, and its held-out curve."""
    about = json.loads(run.record.read_text(encoding="utf-8"))
    config, rows = about["config"], run.read_metrics()
    trained = [*accumulate(int(row["group_rows"]) for row in rows)]
    return {
        "command": about["command"],
        "seed": about["seed"],
        "config": {key: config[key] for key in ("model", "data", "noise", "loss", "lora", "train", "sft")},
        "versions": about["versions"],
        "git": about["git"],
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens_seen"],
        "group_rows": trained[-1],
        "curve": [
            {"group_rows": n} | {key: row[key] for key in CURVE}
            for n, row in zip(trained, rows, strict=True)
            if "eval_loss" in row
        ],
    }


def put_into(package: Path, merged: Path) -> None:
    """Copy the model and the record of its training into the package, except for its card, which people write."""
    package.mkdir(parents=True, exist_ok=True)
    for path in sorted(merged.iterdir()):
        if path.is_file() and path.name != "README.md":
            shutil.copyfile(path, package / path.name)
    write_json(package / "training.json", {"runs": [record(RunFolder(Path("runs") / part)) for part in PARTS]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ship"), help="folder of everything that is made")
    parser.add_argument("--package", type=Path, default=MODELS / SHIPPED_MODEL, help="folder of the finished model")
    args = parser.parse_args()
    package = args.package.resolve()
    with inside(args.out):
        write_prompts(Path())
        checkpoint, merged = train(), Path("merged")
        if not merged.exists():
            merge([Path(checkpoint)], merged, half=True)
        modes = {mode: preset._asdict() for mode, preset in PRESETS.items()}
        write_json(merged / "generation_config.json", {"hilda": modes})
        put_into(package, merged)
    say(
        f"{package}: {sum(path.stat().st_size for path in package.iterdir()) / 1e6:.1f} MB; measure it with make bench-shipped"
    )


if __name__ == "__main__":
    main()
