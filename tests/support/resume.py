"""Runs that are killed at a chosen moment, and what two runs must have in common."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from hildanext.training.checkpoint import list_checkpoints
from hildanext.training.run_folder import RunFolder
from support.forked import Fault


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def strike(owner: str, name: str, call: int, then: Callable[..., Any] = die) -> None:
    """Replace `owner.name` by a function that runs `then` first on its call number `call` (from 1)."""
    holder = pkgutil.resolve_name(owner)
    function, calls = getattr(holder, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            then(*arguments, **options)
        return function(*arguments, **options)

    setattr(holder, name, counted)


def fault(owner: str, name: str, call: int, then: Callable[..., Any] = die) -> Fault:
    """`strike` as something that can be sent to a process."""
    return partial(strike, f"hildanext.training.{owner}", name, call, then)


def half_a_line(run: RunFolder, row: dict[str, Any]) -> None:
    with open(run.metrics, "a") as file:
        file.write('{"step": 5, "loss": 0.1')
    die()


def _send(number: int, *_: object) -> None:
    os.kill(os.getpid(), number)


def signal_in_step(call: int, name: str) -> Fault:
    """The signal `name` when the run begins its step number `call`."""
    return fault("trainer:Trainer", "train_step", call, partial(_send, signal.Signals[name]))


# Where SIGKILL strikes a run of 6 steps that saves every 2.
KILLS: dict[str, Fault] = {
    "before anything is saved": fault("run_folder:RunFolder", "log", 2),
    "in a step": fault("trainer:Trainer", "train_step", 5),
    "in a line of the metrics": fault("run_folder:RunFolder", "log", 5, half_a_line),
    "between the weights and the optimizer": fault("checkpoint", "save_file", 2),
    "before the checkpoint gets its name": fault("checkpoint:os", "replace", 3),
    "while an old checkpoint is removed": fault("checkpoint", "remove_checkpoint", 1),
    "before the curves": fault("trainer", "draw_curves", 2),
    "after the last step": fault("trainer", "draw_curves", 3),
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
