"""Runs in a process of their own that kill themselves at a chosen moment, and what two runs must have in common."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from hildanext.training.checkpoint import list_checkpoints

# The command line in a process of its own that kills itself. FAULT runs first and may replace parts of the package.
CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from hildanext.training import checkpoint, run_folder, trainer
from hildanext import cli

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at(number, what, then=die):
    # `what`, but on its call `number` (from 1) `then` runs first.
    calls = 0
    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            then(*arguments, **options)
        return what(*arguments, **options)
    return counted

FAULT
sys.exit(cli.main(sys.argv[1:]))
"""

# Where SIGKILL strikes a run of 6 steps that saves every 2: (moment, fault).
KILLS = {
    "before anything is saved": "run_folder.RunFolder.log = at(2, run_folder.RunFolder.log)",
    "in a step": "trainer.Trainer.train_step = at(5, trainer.Trainer.train_step)",
    "in a line of the metrics": """
def half(run, row):
    with open(run.metrics, "a") as file:
        file.write('{"step": 5, "loss": 0.1')
    die()
run_folder.RunFolder.log = at(5, run_folder.RunFolder.log, half)""",
    "between the weights and the optimizer": "checkpoint.save_file = at(2, checkpoint.save_file)",
    "before the checkpoint gets its name": "checkpoint.os.replace = at(2, checkpoint.os.replace)",
    "while an old checkpoint is removed": "checkpoint.remove_checkpoint = at(1, checkpoint.remove_checkpoint)",
    "before the curves": "trainer.draw_curves = at(2, trainer.draw_curves)",
    "after the last step": "trainer.draw_curves = at(3, trainer.draw_curves)",
}


class Outcome(NamedTuple):
    """What must not depend on the disturbance: the metrics less the two that measure the machine, and all saved tensors."""

    metrics: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]


def outcome(run: Path) -> Outcome:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        del row["tokens_per_second"], row["peak_memory_mb"]
    step, last = list_checkpoints(run / "checkpoints")[-1]
    assert step == metrics[-1]["step"]
    files = sorted(last.glob("*.safetensors"))
    return Outcome(metrics, {name: tensor for file in files for name, tensor in load_file(file).items()})


def assert_undisturbed(run: Path, reference: Path) -> None:
    """Equal to the last bit."""
    found, expected = outcome(run), outcome(reference)
    assert found.metrics == expected.metrics
    assert found.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert torch.equal(found.tensors[name], value), name
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.rglob(".*"))


def child(fault: str, *argv: object) -> subprocess.CompletedProcess[str]:
    code = CHILD.replace("FAULT", fault)
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True)
