"""Checkpoint merging (LLaDA2.0 section 4.3): the fp32 mean of the best checkpoints. Mismatches are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hildanext.checkpoint import STATE, TENSORS, list_checkpoints, verify
from hildanext.errors import CheckpointError, UsageError
from hildanext.files import fsync_folder, sha256_of, write_json

SAME_KEYS = ("architectures", "vocab_size", "mask_token_id", "block_size")


def best_checkpoints(run: Path, k: int) -> list[Path]:
    """The k checkpoints of a run with the lowest evaluation loss. Raises UsageError when there are fewer, or k < 1."""
    if k < 1:
        raise UsageError(f"--k {k}: at least one checkpoint is needed")
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise UsageError(f"{run}: no checkpoints to merge")
    losses: dict[int, float] = {}
    for _, path in found:
        losses |= {int(step): loss for step, loss in verify(path)["eval_losses"].items()}
    ranked = sorted((losses[step], step, path) for step, path in found if step in losses)
    if len(ranked) < k:
        raise UsageError(
            f"{run}: {len(ranked)} evaluated checkpoints, but {k} are to be merged; lower --k or raise train.keep_best"
        )
    return [path for _, _, path in ranked[:k]]


def _weights(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a Hugging Face folder."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != TENSORS)
    if not files:
        raise UsageError(f"{folder}: no safetensors weights")
    where: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged safetensors file: {error}") from None
    return where


def _check_same(first: Path, other: Path) -> None:
    """Raise CheckpointError, naming what differs, unless both folders hold the same model."""
    one, two = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (first, other))
    for path, config in ((first, one), (other, two)):
        if "hilda" not in config:
            raise CheckpointError(f"{path}: not a converted checkpoint")
    if one["hilda"]["convention"] != two["hilda"]["convention"]:
        raise CheckpointError(
            f"{other}: convention '{two['hilda']['convention']}', but {first} has '{one['hilda']['convention']}'; they cannot be merged"
        )
    for key in SAME_KEYS:
        if one.get(key) != two.get(key):
            raise CheckpointError(
                f"{other}: {key} is {two.get(key)}, but {one.get(key)} in {first}; they cannot be merged"
            )
    if sha256_of(first / "tokenizer.json") != sha256_of(other / "tokenizer.json"):
        raise CheckpointError(f"{other}: another tokenizer than {first}; they cannot be merged")


def merge(folders: list[Path], out: Path) -> dict[str, Any]:
    """Average checkpoints in float32 into the new folder `out` (atomic). Returns what was merged.

    Raises UsageError (nothing to merge, `out` exists), CheckpointError (names, shapes, tokenizers or conventions differ).
    """
    if not folders:
        raise UsageError("nothing to merge; give --k with a run, or checkpoint folders")
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: not a checkpoint folder")
    maps = [_weights(folder) for folder in folders]
    for folder, where in zip(folders[1:], maps[1:], strict=True):
        _check_same(folders[0], folder)
        if odd := sorted(set(where) ^ set(maps[0])):
            raise CheckpointError(f"{folder}: tensor '{odd[0]}' is not in both checkpoints; they cannot be merged")
    record = {"merged": [str(folder) for folder in folders], "weights": [1 / len(folders)] * len(folders)}
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in folders[0].iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name != STATE:
                shutil.copyfile(path, temporary / path.name)
        for file in sorted(set(maps[0].values())):
            names = [name for name, path in maps[0].items() if path == file]
            save_file({n: _mean(n, maps, folders) for n in names}, temporary / file.name, metadata={"format": "pt"})
        generation = temporary / "generation_config.json"
        if generation.is_file():  # modes calibrated for the first checkpoint are not the mean's
            stored = json.loads(generation.read_text(encoding="utf-8"))
            write_json(generation, {key: value for key, value in stored.items() if key != "hilda"})
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config["hilda"] |= record
        write_json(temporary / "config.json", config)
        for path in temporary.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, out)
        fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {"out": str(out), **record}


def _mean(name: str, maps: list[dict[str, Path]], folders: list[Path]) -> torch.Tensor:
    """fp32 mean of one tensor over the checkpoints, in the first one's dtype."""
    total: torch.Tensor | None = None
    for where, folder in zip(maps, folders, strict=True):
        with safe_open(where[name], "pt") as file:
            tensor = file.get_tensor(name)
        if total is None:
            total, dtype = tensor.float(), tensor.dtype
            continue
        if tensor.shape != total.shape:
            raise CheckpointError(
                f"{folder}: tensor '{name}' has shape {list(tensor.shape)}, not {list(total.shape)} as in {folders[0]}; they cannot be merged"
            )
        total = total + tensor.float()
    assert total is not None
    return (total / len(folders)).to(dtype)
