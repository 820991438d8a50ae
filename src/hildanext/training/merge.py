"""Checkpoint merging (LLaDA2.0 section 4.3): the fp32 mean of the best checkpoints. Mismatches are refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hildanext.config import ModelConfig
from hildanext.errors import CheckpointError, UsageError
from hildanext.files import fsync_folder, fsync_tree, sha256_of, write_json, writing
from hildanext.model.adapter_file import SETTINGS, WEIGHTS, Adapter, LoraFactors, read_adapter, write_adapter
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.progress import say
from hildanext.training.checkpoint import STATE, TENSORS, list_checkpoints, verify

SAME_KEYS = ("architectures", "vocab_size", "mask_token_id", "block_size")


def best_checkpoints(run: Path, k: int) -> list[Path]:
    """The k checkpoints of a run with the lowest evaluation loss; damaged ones are named and left out.

    Raises UsageError when there are fewer, or k < 1.
    """
    if k < 1:
        raise UsageError(f"--k {k}: at least one checkpoint is needed")
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise UsageError(f"{run}: no checkpoints to merge")
    losses: dict[int, float] = {}
    whole = []
    for step, path in found:
        try:
            losses |= {int(at): loss for at, loss in verify(path)["eval_losses"].items()}
            whole.append((step, path))
        except CheckpointError as error:
            say(f"{error}; left out of the merge")
    ranked = sorted((losses[step], step, path) for step, path in whole if step in losses)
    n_damaged = len(found) - len(whole)
    if n_damaged:
        say(f"{run}: {n_damaged} of {len(found)} checkpoints are damaged; the best of the others are merged")
    if len(ranked) < k:
        damaged = f" ({n_damaged} more are damaged)" if n_damaged else ""
        raise UsageError(
            f"{run}: {len(ranked)} evaluated checkpoints{damaged}, but {k} are to be merged; lower --k or raise train.keep_best"
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


def _tokens_trained(folder: Path) -> int:
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens: int = stored.get("hilda", {}).get("tokens_trained", 0)
    return tokens


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
    bases = [config["hilda"].get("adapter") for config in (one, two)]
    if all(bases) and (bases[0]["fingerprint"], bases[0]["seed"]) != (bases[1]["fingerprint"], bases[1]["seed"]):
        raise CheckpointError(
            f"{other}: an adapter of '{bases[1]['base']}', but {first} is one of '{bases[0]['base']}' with other weights; they "
            "cannot be merged"
        )
    if sha256_of(first / "tokenizer.json") != sha256_of(other / "tokenizer.json"):
        raise CheckpointError(f"{other}: another tokenizer than {first}; they cannot be merged")


def merge(
    folders: list[Path], out: Path, *, rank: int | None = None, half: bool = False, full: ModelConfig | None = None
) -> dict[str, Any]:
    """Average checkpoints in float32 into the new folder `out` (atomic). Returns what was merged.

    Adapters give an adapter whose rank is the sum of theirs: their mean exactly. rank: the best of that rank instead, and
    how far from the mean it is. half: stored in float16. full: added to the base's weights, loaded as this says but for
    its name. Raises UsageError (nothing to merge, `out` exists, an option for the other kind), CheckpointError (names,
    shapes, tokenizers, conventions or bases differ, or whole checkpoints among adapters).
    """
    if not folders:
        raise UsageError("nothing to merge; give --k with a run, or checkpoint folders")
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: not a checkpoint folder")
    kinds = [(folder / SETTINGS).is_file() for folder in folders]
    if any(kinds) and not all(kinds):
        whole, adapter = folders[kinds.index(False)], folders[kinds.index(True)]
        raise CheckpointError(f"{whole} holds whole weights, {adapter} an adapter; they cannot be merged")
    for folder in folders[1:]:
        _check_same(folders[0], folder)
    record: dict[str, Any] = {"merged": [str(folder) for folder in folders]}
    record["weights"] = [1 / len(folders)] * len(folders)
    record["tokens_trained"] = max(_tokens_trained(folder) for folder in folders)
    if kinds[0]:
        return {"out": str(out), **_merge_adapters(folders, out, record, rank, half, full)}
    if rank is not None or half or full is not None:
        raise UsageError(f"--rank, --half and --full are for adapters; {folders[0]} holds whole weights")
    maps = [_weights(folder) for folder in folders]
    for folder, where in zip(folders[1:], maps[1:], strict=True):
        if odd := sorted(set(where) ^ set(maps[0])):
            raise CheckpointError(f"{folder}: tensor '{odd[0]}' is not in both checkpoints; they cannot be merged")
    with _new_folder(out) as temporary:
        _copy_the_rest(folders[0], temporary, record)
        for file in sorted(set(maps[0].values())):
            names = [name for name, path in maps[0].items() if path == file]
            save_file({n: _mean(n, maps, folders) for n in names}, temporary / file.name, metadata={"format": "pt"})
    return {"out": str(out), **record}


def _merge_adapters(
    folders: list[Path], out: Path, record: dict[str, Any], rank: int | None, half: bool, full: ModelConfig | None
) -> dict[str, Any]:
    if full is not None and (rank is not None or half):
        raise UsageError("--full writes whole weights in float32: leave out --rank and --half")
    parts, settings = zip(*(read_adapter(folder / WEIGHTS, folder / SETTINGS) for folder in folders), strict=True)
    mean = mean_adapter(list(parts), folders)
    if rank is not None:
        mean, record["rank_error"] = compress(mean, rank)
    if full is None:
        with _new_folder(out) as temporary:
            _copy_the_rest(folders[0], temporary, record)
            write_adapter(temporary, mean, settings[0], torch.float16 if half else torch.float32)
        return record
    source = {"base": str(folders[0]), "convention": None, "device": "cpu", "dtype": "float32"}
    lm, _ = load_diffusion_lm(full.model_copy(update=source), added=mean)
    lm.record |= record
    with _new_folder(out) as temporary:
        save_diffusion_lm(lm, temporary)
    return record


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that gets the name `out` once the block has filled it, and is removed if it does not.

    Raises WriteError when the disk is full.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(out):
            temporary.mkdir(parents=True)
            yield temporary
            fsync_tree(temporary)
            os.replace(temporary, out)
            fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy_the_rest(first: Path, folder: Path, record: dict[str, Any]) -> None:
    """All but weights and what a resume needs; `record` goes into config.json."""
    for path in first.rglob("*"):  # a tokenizer may keep further chat templates in a folder
        if path.is_file() and path.suffix != ".safetensors" and path.name != STATE:
            copy = folder / path.relative_to(first)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    generation = folder / "generation_config.json"
    if generation.is_file():  # modes calibrated for the first checkpoint are not the mean's
        stored = json.loads(generation.read_text(encoding="utf-8"))
        write_json(generation, {key: value for key, value in stored.items() if key != "hilda"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["hilda"] |= record
    write_json(folder / "config.json", config)


def mean_adapter(adapters: list[Adapter], folders: list[Path]) -> Adapter:
    """The mean of low-rank changes, exactly: sum_i (s_i / k) B_i A_i is one product of the factors side by side.

    The mean of the factors would be another change. Raises CheckpointError when two adapters change other matrices.
    """
    first, k = adapters[0], len(adapters)
    if k == 1:
        return first
    for folder, other in zip(folders, adapters, strict=True):
        if odd := sorted(set(first.pairs) ^ set(other.pairs)):
            raise CheckpointError(f"{folder}: '{odd[0]}' is not in both adapters; they cannot be merged")
    pairs = {
        name: LoraFactors(
            torch.cat([one.pairs[name].a for one in adapters]),
            torch.cat([one.pairs[name].b * (one.scaling / k) for one in adapters], dim=1),
        )
        for name in first.pairs
    }
    return first._replace(scaling=1.0, pairs=pairs, row=torch.stack([one.row for one in adapters]).mean(0))


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The nearest adapter of at most `rank`, by singular values; and its distance as a share of the change (Frobenius).

    The mask token's row stays as it is.
    """
    if rank < 1:
        raise UsageError(f"--rank {rank}: at least one rank is needed")
    pairs, kept, lost = {}, 0.0, 0.0
    for name, (a, b) in adapter.pairs.items():
        q_b, r_b = torch.linalg.qr(adapter.scaling * b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, values, v = torch.linalg.svd(r_b @ r_a.T)
        root = values[:rank].sqrt()
        pairs[name] = LoraFactors((root[:, None] * (v[:rank] @ q_a.T)).float(), (q_b @ u[:, :rank] * root).float())
        kept, lost = kept + values[:rank].square().sum().item(), lost + values[rank:].square().sum().item()
    return adapter._replace(scaling=1.0, pairs=pairs), math.sqrt(lost / (kept + lost)) if lost else 0.0


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
