"""Adapter files: read and write low-rank weight changes in peft's format, and add them to a base.

A matrix W [out, in] becomes W + scaling * B A with A [r, in] and B [out, r] (Hu et al. 2021, arXiv 2106.09685). The
rows of new tokens have a full-rank change of their own, a vector [H]: the mask token's row, and in tied models those of
DELETE and INSERT. In the file they are the last ranks of the embedding's pair, the mask token's the very last, each with
a B that is one-hot at its token, so that peft applies them without knowing about such tokens.
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
_PREFIX, _DRAFT_HEAD = "base_model.model.", "draft_head."


class LoraFactors(NamedTuple):
    """The two factors of a low-rank change, float32."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]


class Adapter(NamedTuple):
    """A low-rank change of a base's weights. In tied models, changes of the embedding also apply to the head."""

    scaling: float
    pairs: dict[str, LoraFactors]  # by module name
    embedding: str  # name of the input embedding's module
    rows: dict[int, Tensor]  # token -> [H] float32, added to its embedding row; the mask token is the first
    n_rows: int  # V, the number of embedding rows
    draft_head: dict[str, Tensor] = {}  # noqa: RUF012 - never changed; tensors of `DraftHead` by name, float32

    @property
    def mask_token_id(self) -> int:
        return next(iter(self.rows))

    @property
    def row(self) -> Tensor:
        """[H] float32, added to the mask token's embedding row."""
        return self.rows[self.mask_token_id]

    @property
    def rank(self) -> int:
        return next(iter(self.pairs.values())).a.shape[0]


def write_adapter(folder: Path, adapter: Adapter, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into `folder`. The write is not atomic.

    settings: peft's LoraConfig without ranks and scaling. The keys of its `rank_pattern` name the modules that share
    the embedding's matrix. dtype: the type of the tensors in the file.
    """
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.pairs.items():
        if name != adapter.embedding:
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = a, b
    ids = list(adapter.rows)[::-1]
    one_hot = torch.zeros(adapter.n_rows, len(ids))
    one_hot[ids, range(len(ids))] = 1 / adapter.scaling
    # For embeddings, peft names the factors after the transposed matrix: A holds our B, and B our A.
    a, b = torch.stack([adapter.rows[token].cpu() for token in ids]), one_hot
    if adapter.embedding in adapter.pairs:
        low_rank = adapter.pairs[adapter.embedding]
        a, b = torch.cat([low_rank.a.cpu(), a]), torch.cat([low_rank.b.cpu(), b], dim=1)
    tensors[f"{_PREFIX}{adapter.embedding}.lora_embedding_A"] = b.T
    tensors[f"{_PREFIX}{adapter.embedding}.lora_embedding_B"] = a.T
    tensors |= {f"{_DRAFT_HEAD}{name}": tensor for name, tensor in adapter.draft_head.items()}
    save_file({n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    # The embedding's rank differs (r + 1 or r + 3, or 1 in untied models). peft scales by alpha / rank, so its alpha differs
    # too.
    embedding_ranks = dict.fromkeys(settings["rank_pattern"], len(a))
    ranks = {"r": adapter.rank, "lora_alpha": adapter.scaling * adapter.rank, "rank_pattern": embedding_ranks}
    alphas = {"alpha_pattern": {name: adapter.scaling * rank for name, rank in embedding_ranks.items()}}
    write_json(folder / SETTINGS, settings | ranks | alphas)


def read_adapter(weights: Path, settings: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read the files of `write_adapter`: (adapter, settings).

    Raises CheckpointError, which names the file, for a damaged adapter and for one without a mask token's row.
    """
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
        raise CheckpointError(
            f"{weights}: has no embedding row for a mask token; this is not an adapter of a converted model"
        )
    b, a = (tensors.pop(f"{embedding}.lora_embedding_{letter}").T for letter in "AB")
    pairs = {
        name.removesuffix(".lora_A.weight"): LoraFactors(tensor, tensors[name.replace(".lora_A.", ".lora_B.")])
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    n = max(len(a) - stored["r"], 1)  # rows of new tokens
    if len(a) > n:
        pairs[embedding] = LoraFactors(a[:-n].contiguous(), b[:, :-n].contiguous())
    rows = {int(b[:, -i].argmax()): a[-i].clone() for i in range(1, n + 1)}
    head = {n.removeprefix(_DRAFT_HEAD): tensor for n, tensor in tensors.items() if n.startswith(_DRAFT_HEAD)}
    return Adapter(scaling, pairs, embedding, rows, len(b), head), stored


@torch.no_grad()
def add_adapter(model: PreTrainedModel, adapter: Adapter, adapter_name: str) -> None:
    """Add the change to the model's weights in place, computed in float32.

    Raises ModelError, which names `adapter_name`, when the model lacks a module or its shape differs.
    """
    for name, (a, b) in adapter.pairs.items():
        weight = _parameter(model, name, adapter_name)
        transposed = isinstance(model.get_submodule(name), Conv1D)  # GPT-2 stores [in, out]
        a, b = a.to(weight.device), b.to(weight.device)
        change = adapter.scaling * (a.T @ b.T if transposed else b @ a)
        if change.shape != weight.shape:
            raise ModelError(
                f"adapter '{adapter_name}' changes '{name}' as a matrix of shape {list(change.shape)}, but in the base it "
                f"has shape {list(weight.shape)}"
            )
        weight.copy_(weight.float() + change)
    weight = _parameter(model, adapter.embedding, adapter_name)
    add_rows(weight, adapter)


@torch.no_grad()
def add_rows(embedding: Tensor, adapter: Adapter) -> None:
    """Add the changes of the new tokens' rows to an embedding [V, H] in place, computed in float32."""
    for token, change in adapter.rows.items():
        row = embedding[token]
        embedding[token] = (row.float() + change.to(row.device)).to(row.dtype)


def _parameter(model: PreTrainedModel, name: str, adapter_name: str) -> nn.Parameter:
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        raise ModelError(
            f"adapter '{adapter_name}' changes '{name}', which {type(model).__name__} does not have"
        ) from None
    assert isinstance(weight, nn.Parameter)
    return weight
