"""Checkpoints: a complete Hugging Face folder plus what a resume needs, written to a temporary name and renamed.

A folder called step-N is always whole. Optimizer moments are safetensors; nothing here is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hildanext.errors import CheckpointError
from hildanext.files import fsync_folder, fsync_tree, write_json, writing
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.model.loading import save_diffusion_lm
from hildanext.training.parallel import like, whole

STATE, TENSORS = "trainer.json", "trainer.safetensors"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str], keep: bool = True) -> dict[str, Tensor]:
    """Optimizer state as flat tensors `parameter|key`, counters as `parameter|int:key`. `names`: id(parameter) -> name.

    Every process must call it; those that do not `keep` get nothing.
    """
    found: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value = whole(value.detach())
                if not keep:
                    continue
                value = value.cpu().contiguous()
                # bitsandbytes' parameters share their tables, which safetensors refuses.
                found[f"{names[id(parameter)]}|{key}"] = value.clone() if key.startswith("qmap") else value
            elif isinstance(value, int):
                found[f"{names[id(parameter)]}|int:{key}"] = torch.tensor(value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: dict[int, str]) -> None:
    """Put `optimizer_tensors` back. Raises CheckpointError when they do not match the model's parameters."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    by_name: dict[str, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("|")
        by_name.setdefault(name, {})[key] = value
    wanted = {names[id(p)] for p in groups}
    if by_name and set(by_name) != wanted:
        odd = sorted(set(by_name) ^ wanted)[0]
        raise CheckpointError(f"optimizer state does not match the model: '{odd}' is on one side only")
    for parameter, group in groups.items():
        if state := by_name.get(names[id(parameter)]):
            optimizer.state[parameter] = dict(_placed(key, value, parameter, group) for key, value in state.items())


def _placed(key: str, value: Tensor, parameter: Tensor, group: dict[str, Any]) -> tuple[str, Tensor | int]:
    """A piece of optimizer state where its optimizer wants it: with the parameter, whatever its shape."""
    if key.startswith("int:"):
        return key.removeprefix("int:"), int(value)
    if key == "step":  # counted on the CPU unless a kernel reads it
        return key, value.to(parameter.device) if group.get("fused") or group.get("capturable") else value
    return key, like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)


def save_checkpoint(
    folder: Path,
    step: int,
    lm: DiffusionLM,
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-N` atomically and return it. `state` is JSON (cursor, best list, ...), `tensors` the rest.

    Raises WriteError when the disk is full: nothing is left of the attempt, and older checkpoints are as they were.
    """
    final, temporary = folder / f"step-{step}", folder / f".tmp-step-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(final):
            temporary.mkdir(parents=True)
            save_diffusion_lm(lm, temporary, weights)
            save_file(tensors, temporary / TENSORS)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
            write_json(temporary / STATE, {"step": step, **state, "files": sizes})
            fsync_tree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # a resumed run writes a step again
        remove_checkpoint(final)
    os.replace(temporary, final)
    fsync_folder(folder)
    return final


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that no half of it ever carries the name step-N."""
    doomed = path.with_name(f".deleting-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, oldest first. Writes nothing: a training may be at work there."""
    found = [(int(path.name.removeprefix("step-")), path) for path in folder.glob("step-*") if path.is_dir()]
    return sorted(found)


def rewind_checkpoints(folder: Path, step: int) -> list[Path]:
    """For the trainer alone: remove what killed writes left, and what is newer than `step`, from where a run goes on.

    Newer ones are damaged, and `prune` would keep them as the newest in place of whole ones. Returns those.
    """
    for pattern in (".tmp-step-*", ".deleting-step-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    newer = [path for found, path in list_checkpoints(folder) if found > step]
    for path in newer:
        remove_checkpoint(path)
    return newer


def prune(folder: Path, keep_last: int, keep_best: int, eval_losses: Mapping[int, float]) -> None:
    """Remove checkpoints that are neither among the newest nor among the best by evaluation loss."""
    found = list_checkpoints(folder)
    ranked = sorted((step for step, _ in found if step in eval_losses), key=lambda step: (eval_losses[step], step))
    kept = {step for step, _ in found[-keep_last:]} | set(ranked[:keep_best])
    for step, path in found:
        if step not in kept:
            remove_checkpoint(path)


def verify(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state and check that every file has its recorded size. Raises CheckpointError naming the file."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / STATE}: not a readable checkpoint state: {error}") from None
    for name, size in state["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else -1
        if found != size:
            what = "is missing" if found < 0 else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{path / name} {what}; the checkpoint is damaged")
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Optimizer, generator and scaler tensors of a checkpoint."""
    try:
        return load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / TENSORS}: damaged: {error}") from None


def newest_good(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint that is whole: (path, state, one line for each damaged one passed over); None without any."""
    problems: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        try:
            return path, verify(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(problems[0] + "; no older checkpoint is whole")
    return None
