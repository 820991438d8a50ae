"""The converted checkpoint that is exported: its files, its tokens and its decoding settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from hildanext.config import DecodeConfig, Mode, ModelConfig
from hildanext.config.model import is_local_path
from hildanext.data.tokenizer import token_ids
from hildanext.decoding.settings import Settings, read_presets, resolve
from hildanext.errors import ModelError, UsageError, WriteError
from hildanext.export.weights import Stored, ranges, stored_tensors
from hildanext.model.adapter_file import SETTINGS
from hildanext.model.pretrained import load_tokenizer, read_config_dict, read_generation_config
from hildanext.model.prompts import end_ids
from hildanext.model.published import is_published
from hildanext.training.checkpoint import STATE, TENSORS

# Keys of config.json, of a model that was trained to insert and delete.
EDIT_TOKENS = ("delete_token_id", "split_token_id")


class Checkpoint(NamedTuple):
    """A converted checkpoint's folder, read."""

    folder: Path
    config: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json
    tokenizer: PreTrainedTokenizerBase

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = self.config["hilda"]
        return record

    @property
    def base(self) -> str:
        """The base's name on the hub; of a local folder its last part."""
        base = str(self.record["base_model"])
        return Path(base).name if is_local_path(base) or Path(base).exists() else base

    @property
    def mask_token_id(self) -> int:
        return int(self.config["mask_token_id"])

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def has_indels(self) -> bool:
        """Whether the model was trained to insert and delete."""
        return all(key in self.config for key in EDIT_TOKENS)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a text."""
        return end_ids(self.tokenizer, self.generation.get("eos_token_id"))

    def settings(self, mode: Mode) -> Settings:
        """The checkpoint's own settings of a mode: calibrated ones, else the built-in presets."""
        presets = read_presets(self.generation.get("hilda", {}))
        return resolve(DecodeConfig(mode=mode), self.config["block_size"], presets)

    def tensors(self) -> dict[str, Stored]:
        """The model's tensors by name. Raises ModelError if the folder has none."""
        return stored_tensors(self.weight_files())

    def weight_files(self) -> list[Path]:
        """The safetensors files of the weights. Raises ModelError if the folder has none."""
        found = [path for path in sorted(self.folder.glob("*.safetensors")) if path.name != TENSORS]
        if not found:
            raise ModelError(f"'{self.folder}': no safetensors weights; choose another checkpoint")
        return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a converted checkpoint's folder. Raises UsageError for one that is not converted, ModelError for a damaged one."""
    model = ModelConfig(base=str(folder))
    if not folder.is_dir():
        raise UsageError(f"'{folder}': no such folder; give the folder of a converted checkpoint")
    config = read_config_dict(model)
    if is_published(config):
        raise UsageError(
            f"'{folder}' is in a published model's own layout ({config['model_type']}); tune it, then export that"
        )
    if "hilda" not in config:
        raise UsageError(f"'{folder}' is not a converted checkpoint; run 'hildanext convert-wsd' first")
    if not config.get("block_size"):
        raise ModelError(f"'{folder}': config.json has no block_size, which decoding needs; convert the model again")
    return Checkpoint(folder, config, read_generation_config(model), load_tokenizer(model))


def require_servable(checkpoint: Checkpoint, target: str) -> None:
    """Raise UsageError for a checkpoint that only HildaNext can decode, with the conversion that could be exported."""
    folder, record = checkpoint.folder, checkpoint.record
    if "gate" in record:
        raise UsageError(
            f"'{folder}' has a gated adapter, which {target} does not know; convert with lora.gate false and "
            "model.convention 'in_place'"
        )
    if (folder / SETTINGS).is_file():
        raise UsageError(
            f"'{folder}' is an adapter; make a whole model of it first: hildanext merge-topk {folder} --full --out FOLDER"
        )
    if record["convention"] != "in_place":
        raise UsageError(
            f"'{folder}' predicts token i at position i-1 (convention 'shifted'), {target} reads position i; convert with "
            "model.convention 'in_place'"
        )


def never_decoded(tokenizer: PreTrainedTokenizerBase, mask_token_id: int, n_rows: int) -> list[tuple[int, int]]:
    """Half-open ranges of the ids below `n_rows` that no text contains: the mask token, and ids without a token."""
    decoded = set(token_ids(tokenizer)) - {mask_token_id}
    return ranges(i for i in range(n_rows) if i not in decoded)


def other_files(checkpoint: Checkpoint, left_out: Iterable[str] = ()) -> list[Path]:
    """Files of the folder besides weights and training state, without those whose names are in `left_out`."""
    skipped = {STATE, *left_out}
    found = sorted(path for path in checkpoint.folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [
        path
        for path in found
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json") and path.name not in skipped
    ]


def copy_files(paths: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files, those in subfolders into the same subfolders."""
    for path in paths:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def require_space(out: Path, n_bytes: int) -> None:
    """Raise WriteError if the disk of the new folder `out` has fewer free bytes."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if n_bytes > free:
        raise WriteError(
            f"{out}: needs {n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free some space or choose another --out"
        )
