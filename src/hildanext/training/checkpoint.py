"""Checkpoints: a Hugging Face folder plus the training state, written under a temporary name and then renamed.

A folder named step-N is therefore always complete. Optimizer state is stored as safetensors; nothing is pickled.
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

STATE, TENSORS = "trainer.json", "trainer.safetensors"  # training state beside the model's own files


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str], keep: bool = True) -> dict[str, Tensor]:
    """Optimizer state as a flat dictionary: tensors as `parameter|key`, integers as `parameter|int:key`.

    names: id(parameter) -> name. All processes must call this function; those with keep=False get an empty dictionary.
    """
    found: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                value = whole(value.detach())
                if not keep:
                    continue
                value = value.cpu().contiguous()
                # bitsandbytes shares its quantization tables between parameters; safetensors rejects shared tensors.
                found[f"{names[id(parameter)]}|{key}"] = value.clone() if key.startswith("qmap") else value
            elif isinstance(value, int):
                found[f"{names[id(parameter)]}|int:{key}"] = torch.tensor(value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], names: dict[int, str]) -> None:
    """Load the result of `optimizer_tensors`. Raises CheckpointError if it does not match the trained parameters."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    by_name: dict[str, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("|")
        by_name.setdefault(name, {})[key] = value
    trained = {names[id(p)] for p in groups}
    if by_name and set(by_name) != trained:
        odd = sorted(set(by_name) ^ trained)[0]
        raise CheckpointError(
            f"'{odd}': the optimizer state does not match the model; resume with the run's model and adapter settings"
        )
    for parameter, group in groups.items():
        if state := by_name.get(names[id(parameter)]):
            optimizer.state[parameter] = dict(_placed(key, value, parameter, group) for key, value in state.items())


def _placed(key: str, value: Tensor, parameter: Tensor, group: dict[str, Any]) -> tuple[str, Tensor | int]:
    """An entry of a parameter's optimizer state, on the device and with the sharding the optimizer expects."""
    if key.startswith("int:"):
        return key.removeprefix("int:"), int(value)
    if key == "step":  # stays on the CPU unless a fused kernel reads it
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
    """Write the checkpoint `folder/step-N` atomically and return its path.

    state: the JSON part of the training state. tensors: its tensors (optimizer, random generators). weights: the
    model's weights, gathered if they are sharded. Raises WriteError if it cannot be written, for example because the
    disk is full; the partial checkpoint is then removed and older checkpoints are left untouched.
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
    if final.exists():  # a resumed run can repeat a step
        remove_checkpoint(final)
    os.replace(temporary, final)
    fsync_folder(folder)
    return final


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that no partly deleted folder is named step-N."""
    doomed = path.with_name(f".deleting-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, oldest first. Read-only, so it is safe while a training runs."""
    return sorted((int(path.name.removeprefix("step-")), path) for path in folder.glob("step-*") if path.is_dir())


def rewind_checkpoints(folder: Path, step: int) -> list[Path]:
    """Remove temporary folders of interrupted writes and checkpoints newer than `step`, the step to resume from.

    Newer checkpoints are damaged; `prune` would count them among the newest and delete good ones. Only the trainer
    calls this function. Returns the removed checkpoints.
    """
    for pattern in (".tmp-step-*", ".deleting-step-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    newer = [path for found, path in list_checkpoints(folder) if found > step]
    for path in newer:
        remove_checkpoint(path)
    return newer


def prune(folder: Path, keep_last: int, keep_best: int, eval_losses: Mapping[int, float]) -> None:
    """Keep the `keep_last` newest checkpoints and the `keep_best` with the lowest evaluation loss; remove the others."""
    found = list_checkpoints(folder)
    ranked = sorted((step for step, _ in found if step in eval_losses), key=lambda step: (eval_losses[step], step))
    kept = {step for step, _ in found[-keep_last:]} | set(ranked[:keep_best])
    for step, path in found:
        if step not in kept:
            remove_checkpoint(path)


def verify(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state after checking the size of every file. Raises CheckpointError that names the file."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path / STATE}: not a readable checkpoint state ({error}); use another checkpoint"
        ) from None
    for name, size in state["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else -1
        if found != size:
            what = "is missing" if found < 0 else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{path / name} {what}; the checkpoint is damaged")
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint's training state. Raises CheckpointError if the file is missing or damaged."""
    try:
        return load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / TENSORS}: damaged: {error}") from None


def newest_good(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest complete checkpoint: (path, state, one line per damaged newer checkpoint).

    None if the folder has no checkpoints. Raises CheckpointError if every checkpoint is damaged.
    """
    problems: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        try:
            return path, verify(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{problems[0]}; no older checkpoint is complete; start a new run")
    return None
