"""Adapter files: a low-rank change of a base's weights in peft's format; read, written, averaged, added to the base.

A matrix W [out, in] becomes W + scaling * B A with A [r, in] and B [out, r] (Hu et al. 2021, arXiv 2106.09685). The mask
token's row of the embedding is changed by a vector of its own. In the file it is the last rank of the embedding's pair,
whose B is one-hot at the mask token, so that peft reads it as what it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hildanext.errors import CheckpointError, ModelError
from hildanext.files import write_json

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


class LoraFactors(NamedTuple):
    """The factors of a matrix's change, float32."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]


class Adapter(NamedTuple):
    """A change of a base's weights."""

    scaling: float
    pairs: dict[str, LoraFactors]  # by module; of tied models the embedding's is the head's too
    embedding: str  # the input embedding's module
    row: Tensor  # [H] float32, added to the mask token's row of the embedding (of tied models, to the head's too)
    mask_token_id: int
    n_rows: int  # V, of the embedding

    @property
    def rank(self) -> int:
        return next(iter(self.pairs.values())).a.shape[0]


def write_adapter(folder: Path, adapter: Adapter, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; not atomic by itself.

    settings: peft's LoraConfig but for ranks and scaling; the keys of its rank_pattern are the modules that share the
    embedding's matrix.
    """
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        if name != adapter.embedding:
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = a, b
    one_hot = torch.zeros(adapter.n_rows, 1)
    one_hot[adapter.mask_token_id] = 1 / adapter.scaling
    # peft's names are those of the transposed matrix here.
    a, b = adapter.row[None].cpu(), one_hot
    if adapter.embedding in adapter.pairs:
        own = adapter.pairs[adapter.embedding]
        a, b = torch.cat([own.a.cpu(), a]), torch.cat([own.b.cpu(), b], dim=1)
    tensors[f"{_PREFIX}{adapter.embedding}.lora_embedding_A"] = b.T
    tensors[f"{_PREFIX}{adapter.embedding}.lora_embedding_B"] = a.T
    save_file({n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    # The embedding has one rank more than the rest, or that one only: its scaling must come out the same.
    odd = dict.fromkeys(settings["rank_pattern"], len(a))
    ranks = {"r": adapter.rank, "lora_alpha": adapter.scaling * adapter.rank, "rank_pattern": odd}
    alphas = {"alpha_pattern": {name: adapter.scaling * rank for name, rank in odd.items()}}
    write_json(folder / SETTINGS, settings | ranks | alphas)


def read_adapter(weights: Path, settings: Path) -> tuple[Adapter, dict[str, Any]]:
    """What `write_adapter` wrote, and its settings. Raises CheckpointError naming the file that is damaged or foreign."""
    try:
        stored = json.loads(settings.read_text(encoding="utf-8"))
        scaling = stored["lora_alpha"] / stored["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{settings}: damaged: {type(error).__name__}: {error}") from None
    try:
        tensors = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in load_file(weights).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: damaged: {error}") from None
    embedding = next((n.removesuffix(".lora_embedding_A") for n in tensors if n.endswith(".lora_embedding_A")), None)
    if embedding is None:
        raise CheckpointError(f"{weights}: no row of a mask token in it; not an adapter of a converted model")
    b, a = (tensors.pop(f"{embedding}.lora_embedding_{letter}").T for letter in "AB")
    pairs = {
        name.removesuffix(".lora_A.weight"): LoraFactors(tensor, tensors[name.replace(".lora_A.", ".lora_B.")])
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    if len(a) > 1:
        pairs[embedding] = LoraFactors(a[:-1].contiguous(), b[:, :-1].contiguous())
    return Adapter(scaling, pairs, embedding, a[-1].clone(), int(b[:, -1].argmax()), len(b)), stored


@torch.no_grad()
def add_adapter(model: PreTrainedModel, adapter: Adapter, what: str) -> None:
    """Add the change to a model's weights, computed in float32. Raises ModelError (naming `what`) if it does not fit."""
    for name, (a, b) in adapter.pairs.items():
        weight = _weight_of(model, name, what)
        flipped = isinstance(model.get_submodule(name), Conv1D)
        a, b = a.to(weight.device), b.to(weight.device)
        change = adapter.scaling * (a.T @ b.T if flipped else b @ a)
        if change.shape != weight.shape:
            raise ModelError(
                f"adapter '{what}' changes '{name}' as a matrix of {list(change.shape)}, but the base's is {list(weight.shape)}"
            )
        weight.copy_(weight.float() + change)
    weight = _weight_of(model, adapter.embedding, what)
    row = weight[adapter.mask_token_id]
    weight[adapter.mask_token_id] = (row.float() + adapter.row.to(row.device)).to(row.dtype)


def _weight_of(model: PreTrainedModel, name: str, what: str) -> nn.Parameter:
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        raise ModelError(f"adapter '{what}' changes '{name}', which {type(model).__name__} does not have") from None
    assert isinstance(weight, nn.Parameter)
    return weight
