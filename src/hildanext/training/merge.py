"""Checkpoint merging (LLaDA2.0 section 4.3): the fp32 mean of the best checkpoints of a run.

Checkpoints that do not belong together are refused with an error that names the difference.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hildanext.config import ModelConfig
from hildanext.errors import CheckpointError, UsageError
from hildanext.files import new_folder, sha256_of, write_json
from hildanext.model.adapter_file import SETTINGS, WEIGHTS, Adapter, LoraFactors, read_adapter, write_adapter
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from hildanext.progress import say
from hildanext.training.checkpoint import STATE, TENSORS, list_checkpoints, verify

SAME_KEYS = ("architectures", "vocab_size", "mask_token_id", "block_size")  # of config.json, equal in all checkpoints


def best_checkpoints(run: Path, k: int) -> list[Path]:
    """The k checkpoints of a run with the lowest evaluation loss, best first. Damaged ones are reported and skipped.

    Raises UsageError if k < 1 or the run has fewer than k evaluated checkpoints.
    """
    if k < 1:
        raise UsageError(f"--k {k}: must be at least 1")
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise UsageError(f"{run}: no checkpoints to merge; choose another run with --run")
    losses: dict[int, float] = {}
    complete = []
    for step, path in found:
        try:
            losses |= {int(at): loss for at, loss in verify(path)["eval_losses"].items()}
            complete.append((step, path))
        except CheckpointError as error:
            say(f"{error}; left out of the merge")
    ranked = sorted((losses[step], step, path) for step, path in complete if step in losses)
    n_damaged = len(found) - len(complete)
    if n_damaged:
        say(f"{run}: {n_damaged} of {len(found)} checkpoints are damaged; merging the best of the others")
    if len(ranked) < k:
        damaged = f" ({n_damaged} more are damaged)" if n_damaged else ""
        raise UsageError(
            f"{run}: {len(ranked)} evaluated checkpoints{damaged}, but --k is {k}; lower --k or raise train.keep_best"
        )
    return [path for _, _, path in ranked[:k]]


def merge(
    folders: list[Path], out: Path, *, rank: int | None = None, half: bool = False, full: ModelConfig | None = None
) -> dict[str, Any]:
    """Write the float32 mean of checkpoints to the new folder `out` atomically. Returns the merge record.

    Adapters give an adapter that equals their mean exactly; its rank is the sum of their ranks. Options for adapters:
    rank reduces the mean to its best approximation of that rank and reports the error, half stores it in float16, full
    adds it to the base's weights (the base is loaded with these settings) and writes a whole model.

    Raises UsageError if there is nothing to merge, `out` exists or an option does not apply; CheckpointError if names,
    shapes, tokenizers, conventions or bases differ, or if adapters and whole models are mixed.
    """
    if not folders:
        raise UsageError("nothing to merge; give --k with a run, or checkpoint folders")
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: not a checkpoint folder; it has no config.json")
    is_adapter = [(folder / SETTINGS).is_file() for folder in folders]
    if any(is_adapter) and not all(is_adapter):
        model, adapter = folders[is_adapter.index(False)], folders[is_adapter.index(True)]
        raise CheckpointError(f"{model} holds a whole model, {adapter} an adapter; they cannot be merged")
    for folder in folders[1:]:
        _check_same(folders[0], folder)
    tokens_trained = [_read_config(folder).get("hilda", {}).get("tokens_trained", 0) for folder in folders]
    record: dict[str, Any] = {
        "merged": [str(folder) for folder in folders],
        "weights": [1 / len(folders)] * len(folders),
        "tokens_trained": max(tokens_trained),
    }
    if is_adapter[0]:
        _merge_adapters(folders, out, record, rank, half, full)
    elif rank is not None or half or full is not None:
        raise UsageError(f"--rank, --half and --full are for adapters; {folders[0]} holds a whole model")
    else:
        _merge_models(folders, out, record)
    return {"out": str(out), **record}


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _check_same(first: Path, other: Path) -> None:
    """Raise CheckpointError that names the difference unless both folders hold the same model."""
    a, b = _read_config(first), _read_config(other)
    for path, config in ((first, a), (other, b)):
        if "hilda" not in config:
            raise CheckpointError(f"{path}: not a converted checkpoint; run 'hildanext convert-wsd' first")
    if a["hilda"]["convention"] != b["hilda"]["convention"]:
        raise CheckpointError(
            f"{other}: convention '{b['hilda']['convention']}', but {first} has '{a['hilda']['convention']}'; "
            "they cannot be merged"
        )
    for key in SAME_KEYS:
        if a.get(key) != b.get(key):
            raise CheckpointError(f"{other}: {key} is {b.get(key)}, but {a.get(key)} in {first}; they cannot be merged")
    gates = [config["hilda"].get("gate") for config in (a, b)]
    layouts = [None if gate is None else {key: gate[key] for key in ("causal", "draft_head")} for gate in gates]
    if layouts[0] != layouts[1]:
        raise CheckpointError(
            f"{other}: hilda.gate is {layouts[1]}, but {layouts[0]} in {first}; they cannot be merged"
        )
    bases = [config["hilda"].get("adapter") for config in (a, b)]
    if all(bases) and (bases[0]["fingerprint"], bases[0]["seed"]) != (bases[1]["fingerprint"], bases[1]["seed"]):
        raise CheckpointError(
            f"{other}: an adapter of '{bases[1]['base']}', but {first} is an adapter of '{bases[0]['base']}' with "
            "other weights; they cannot be merged"
        )
    if sha256_of(first / "tokenizer.json") != sha256_of(other / "tokenizer.json"):
        raise CheckpointError(f"{other}: has another tokenizer than {first}; they cannot be merged")


def _merge_models(folders: list[Path], out: Path, record: dict[str, Any]) -> None:
    files_of = [_tensor_files(folder) for folder in folders]  # tensor name -> file, for each checkpoint
    for folder, files in zip(folders[1:], files_of[1:], strict=True):
        if odd := sorted(set(files) ^ set(files_of[0])):
            raise CheckpointError(f"{folder}: tensor '{odd[0]}' is not in both checkpoints; they cannot be merged")
    with new_folder(out) as temporary:
        _copy_other_files(folders[0], temporary, record)
        for file in sorted(set(files_of[0].values())):
            names = [name for name, path in files_of[0].items() if path == file]
            tensors = {name: _mean(name, files_of, folders) for name in names}
            save_file(tensors, temporary / file.name, metadata={"format": "pt"})


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a Hugging Face folder."""
    paths = sorted(path for path in folder.glob("*.safetensors") if path.name != TENSORS)
    if not paths:
        raise UsageError(f"{folder}: no safetensors weights; choose another checkpoint")
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged safetensors file: {error}") from None
    return files


def _mean(name: str, files_of: list[dict[str, Path]], folders: list[Path]) -> torch.Tensor:
    """fp32 mean of a tensor over the checkpoints, in the dtype of the first checkpoint."""
    total: torch.Tensor | None = None
    for files, folder in zip(files_of, folders, strict=True):
        with safe_open(files[name], "pt") as file:
            tensor = file.get_tensor(name)
        if total is None:
            total, dtype = tensor.float(), tensor.dtype
            continue
        if tensor.shape != total.shape:
            raise CheckpointError(
                f"{folder}: tensor '{name}' has shape {list(tensor.shape)}, not {list(total.shape)} as in "
                f"{folders[0]}; they cannot be merged"
            )
        total = total + tensor.float()
    assert total is not None
    return (total / len(folders)).to(dtype)


def _merge_adapters(
    folders: list[Path], out: Path, record: dict[str, Any], rank: int | None, half: bool, full: ModelConfig | None
) -> None:
    """See `merge`. Adds `rank_error` to the record if `rank` is given."""
    if full is not None and (rank is not None or half):
        raise UsageError("--full writes a whole model in float32; leave out --rank and --half")
    if full is not None and "gate" in _read_config(folders[0])["hilda"]:
        raise UsageError(
            f"{folders[0]}: a gated adapter acts on denoised rows only; added to the weights it would change every token. "
            "Leave out --full"
        )
    adapters, settings = zip(*(read_adapter(folder / WEIGHTS, folder / SETTINGS) for folder in folders), strict=True)
    mean = mean_adapter(list(adapters), folders)
    if rank is not None:
        mean, record["rank_error"] = compress(mean, rank)
    if full is None:
        with new_folder(out) as temporary:
            _copy_other_files(folders[0], temporary, record)
            write_adapter(temporary, mean, settings[0], torch.float16 if half else torch.float32)
        return
    source = {"base": str(folders[0]), "convention": None, "device": "cpu", "dtype": "float32"}
    lm, _ = load_diffusion_lm(full.model_copy(update=source), added=mean)
    lm.record |= record
    with new_folder(out) as temporary:
        save_diffusion_lm(lm, temporary)


def mean_adapter(adapters: list[Adapter], folders: list[Path]) -> Adapter:
    """The exact mean of low-rank updates: sum_i (s_i / k) B_i A_i, written as one product of concatenated factors.

    The product of the mean factors would be a different update. Raises CheckpointError if the adapters adapt different
    layers.
    """
    first, k = adapters[0], len(adapters)
    if k == 1:
        return first
    for folder, other in zip(folders, adapters, strict=True):
        if odd := sorted(set(first.pairs) ^ set(other.pairs)):
            raise CheckpointError(f"{folder}: '{odd[0]}' is not in both adapters; they cannot be merged")
    pairs = {
        name: LoraFactors(
            torch.cat([adapter.pairs[name].a for adapter in adapters]),
            torch.cat([adapter.pairs[name].b * (adapter.scaling / k) for adapter in adapters], dim=1),
        )
        for name in first.pairs
    }
    rows = {token: torch.stack([adapter.rows[token] for adapter in adapters]).mean(0) for token in first.rows}
    # A draft head is no linear map. Its mean parameters suit checkpoints of one run.
    head = {name: torch.stack([adapter.draft_head[name] for adapter in adapters]).mean(0) for name in first.draft_head}
    return first._replace(scaling=1.0, pairs=pairs, rows=rows, draft_head=head)


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The closest adapter of at most `rank` (truncated SVD), and its distance relative to the update (Frobenius norm).

    The new tokens' rows are kept unchanged. All layers have one rank in the file, so a layer whose smaller side is below
    it gets zeros for the rest.
    """
    if rank < 1:
        raise UsageError(f"--rank {rank}: must be at least 1")
    rank = min(rank, adapter.rank)
    pairs, kept, lost = {}, 0.0, 0.0
    for name, (a, b) in adapter.pairs.items():
        q_b, r_b = torch.linalg.qr(adapter.scaling * b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, values, v = torch.linalg.svd(r_b @ r_a.T)
        root = values[:rank].sqrt()
        n, rest = len(root), rank - len(root)
        a, b = root[:, None] * (v[:n] @ q_a.T), q_b @ u[:, :n] * root
        pairs[name] = LoraFactors(F.pad(a, (0, 0, 0, rest)).float(), F.pad(b, (0, rest)).float())
        kept, lost = kept + values[:rank].square().sum().item(), lost + values[rank:].square().sum().item()
    return adapter._replace(scaling=1.0, pairs=pairs), math.sqrt(lost / (kept + lost)) if lost else 0.0


def _copy_other_files(first: Path, folder: Path, record: dict[str, Any]) -> None:
    """Copy everything except weights and training state, and add `record` to config.json."""
    for path in first.rglob("*"):  # a tokenizer can have a subfolder with more chat templates
        if path.is_file() and path.suffix != ".safetensors" and path.name != STATE:
            copy = folder / path.relative_to(first)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    generation = folder / "generation_config.json"
    if generation.is_file():  # decoding modes calibrated for the first checkpoint do not apply to the mean
        stored = json.loads(generation.read_text(encoding="utf-8"))
        write_json(generation, {key: value for key, value in stored.items() if key != "hilda"})
    config = _read_config(folder)
    config["hilda"] |= record
    write_json(folder / "config.json", config)
