"""Gated adapters: a change of the base that acts on denoised rows only (arXiv 2507.11851).

A linear layer computes y = W x + g * scaling * B A x, with g = 1 on denoised rows and 0 on clean rows. Clean rows are
causal, so their states, keys and values are the base's own. The mask token's embedding row is trained as well; no clean
row holds that token. Nothing else of the base changes: embedding and head are its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from hildanext.config import LoraConfig
from hildanext.diffusion.groups import Groups, group_mask
from hildanext.diffusion.masks import additive, document_mask
from hildanext.errors import ModelError
from hildanext.model.adapter_file import Adapter, add_rows
from hildanext.model.backbone import weight_matrix
from hildanext.model.diffusion_lm import Batch
from hildanext.model.draft_head import DraftHead, find_draft_head
from hildanext.model.gated_linear import BaseHead, Gate, GatedLinear, find_gate
from hildanext.model.lora import AdaptedEmbedding, find_targets, linear_layers
from hildanext.model.low_rank import LowRank
from hildanext.model.policy import compute_dtype


class Clean(NamedTuple):
    """x_0 through the base: what groups attend to, and what the base predicts. Without gradient."""

    hidden: Tensor  # [B, L, H]: row a predicts token a+1
    keys: list[Tensor]  # of each layer [B, heads, L, D]
    values: list[Tensor]


class _Collect(Cache):
    """Keeps the keys and values of a forward."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Any:
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _Behind(Cache):
    """Puts the keys and values of groups behind those of the clean rows. A layer may be run again in the backward."""

    def __init__(self, clean: Clean) -> None:
        super().__init__(layers=[])
        self.clean = clean

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> Any:
        keys, values = self.clean.keys[layer_idx], self.clean.values[layer_idx]
        return torch.cat([keys.to(key_states), key_states], 2), torch.cat([values.to(value_states), value_states], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@contextlib.contextmanager
def as_base(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the gate is closed and dropout is off: the model is its base."""
    gate, was_training = find_gate(model), model.training
    assert gate is not None
    before, gate.rows = gate.rows, None
    model.eval()
    try:
        yield
    finally:
        gate.rows = before
        model.train(was_training)


@contextlib.contextmanager
def gate_open(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the gate is open for every row, as in training: `group_forward` needs it."""
    gate = find_gate(model)
    assert gate is not None
    before, gate.rows = gate.rows, "all"
    try:
        yield
    finally:
        gate.rows = before


@torch.no_grad()
def clean_forward(model: PreTrainedModel, batch: Batch) -> Clean:
    """x_0 once through the base, causal within each document."""
    kept = _Collect()
    with as_base(model):
        embeds = model.get_input_embeddings()(batch.input_ids)
        mask = additive(document_mask(batch.doc_ids).tril(), compute_dtype(embeds))
        hidden = model.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=batch.position_ids,
            past_key_values=kept,
            use_cache=True,
        ).last_hidden_state
    return Clean(hidden, kept.keys, kept.values)


def group_forward(model: PreTrainedModel, batch: Batch, groups: Groups, clean: Clean, causal: bool) -> Tensor:
    """Hidden states [B, Q, H] of the rows of groups, gate open."""
    embeds = model.get_input_embeddings()(groups.noisy_ids)
    mask = additive(group_mask(batch.doc_ids, groups, causal), compute_dtype(embeds))
    hidden: Tensor = model.base_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=groups.position_ids,
        past_key_values=_Behind(clean),
        use_cache=True,
    ).last_hidden_state
    return hidden


def draft_states(model: PreTrainedModel, batch: Batch, groups: Groups, k: int, hidden: Tensor) -> Tensor:
    """The states that predict the labels: with the draft head, given the tokens before the label, except for `plain` rows.

    hidden [B, Q, H]: of groups of at most k rows.
    """
    head = find_draft_head(model)
    if head is None:
        return hidden
    columns = (groups.anchors + groups.offsets).clamp(max=batch.input_ids.shape[1] - 1)
    before = model.get_input_embeddings()(batch.input_ids.gather(1, columns))
    changed = head.changed(hidden, head.states(head.read(hidden, before), groups.offsets, k))
    return torch.where(groups.plain[:, :, None], hidden, changed)


def inject_gated(model: PreTrainedModel, config: LoraConfig, mask_token_id: int, seed: int) -> list[str]:
    """Freeze a model and insert a new gated adapter of `config.rank`, its gate open. The outputs do not change yet.

    The factors are float32 for every dtype of the base. Returns the names of the adapted layers. Raises ConfigError for a
    target that the model does not have and for layers that are no linear layers of torch.
    """
    assert config.rank is not None
    targets = find_targets(model, config)
    layers = [name for name in linear_layers(model) if any(f".{name}".endswith(f".{target}") for target in targets)]
    if any(isinstance(model.get_submodule(name), Conv1D) for name in layers):
        raise ModelError(
            f"{type(model).__name__} has transposed linear layers (Conv1D), which a gated adapter cannot adapt"
        )
    gate = Gate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.requires_grad_(False)
        for name in layers:
            base = model.get_submodule(name)
            n_in, n_out = cast(int, base.in_features), cast(int, base.out_features)  # quantized layers have them, too
            low_rank = LowRank(config.rank, n_in, n_out, config.scaling).to(model.device)
            model.set_submodule(name, GatedLinear(base, low_rank, gate, config.dropout))
        model.set_input_embeddings(
            AdaptedEmbedding(model.get_input_embeddings(), [mask_token_id], None).to(model.device)
        )
        if config.draft_head is not None:
            hidden = model.config.get_text_config().hidden_size
            model.draft_head = DraftHead(hidden, config.draft_head).to(model.device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return targets


@torch.no_grad()
def open_gate(model: PreTrainedModel, adapter: Adapter, adapter_name: str) -> None:
    """Put a trained gated adapter beside a model's weights, for decoding. The base's weights stay as they are.

    Only the mask token's embedding row is changed in place. Raises ModelError as `insert_gated` does.
    """
    insert_gated(model, adapter, adapter_name)
    add_rows(weight_matrix(model.get_input_embeddings()), adapter)
    model.set_output_embeddings(BaseHead(model.get_output_embeddings(), adapter.mask_token_id))


@torch.no_grad()
def insert_gated(model: PreTrainedModel, adapter: Adapter, adapter_name: str) -> Gate:
    """Replace the adapted linear layers by gated ones around them, gate closed, and add the draft head.

    Raises ModelError, which names `adapter_name`, when the model lacks a module or its shape differs.
    """
    gate = Gate()
    gate.rows = None
    for name, (a, b) in adapter.pairs.items():
        try:
            base: nn.Module | None = model.get_submodule(name)
        except AttributeError:
            base = None
        if not isinstance(base, nn.Linear) or (len(b), a.shape[1]) != tuple(base.weight.shape):
            raise ModelError(
                f"adapter '{adapter_name}' changes '{name}', which {type(model).__name__} does not have like that"
            )
        low_rank = LowRank(a.shape[0], a.shape[1], b.shape[0], scaling=1.0).to(base.weight)
        low_rank.A.copy_(a)
        low_rank.B.copy_(adapter.scaling * b)
        gated = GatedLinear(base, low_rank, gate)
        low_rank.requires_grad_(False)
        model.set_submodule(name, gated)
    if adapter.draft_head:
        width, hidden = adapter.draft_head["down.weight"].shape[0], adapter.draft_head["up.weight"].shape[0]
        head = DraftHead(hidden, width)
        head.load_state_dict(adapter.draft_head)
        model.draft_head = head.to(model.device).requires_grad_(False)
    return gate


class MaskRow(nn.Module):
    """An embedding without a row for the mask token. Where the gate is open, that token gets `row` [H]."""

    def __init__(self, base: nn.Module, row: Tensor, mask_token_id: int, gate: Gate) -> None:
        super().__init__()
        self.base, self.mask_token_id, self.gate = base, mask_token_id, gate
        # No parameter: transformers takes a model's dtype from its first one.
        self.row = row.to(weight_matrix(base))

    @property
    def weight(self) -> Tensor:
        """The matrix [V, H]."""
        return weight_matrix(self.base)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, W] int64 -> [B, W, H]."""
        rows = self.gate.rows
        if not isinstance(rows, Tensor):
            embeds: Tensor = self.base(ids)
            return embeds
        masked = (ids == self.mask_token_id) & (rows[..., 0] > 0)
        embeds = self.base(ids.masked_fill(masked, 0))
        return torch.where(masked[..., None], self.row, embeds)


@torch.no_grad()
def gated_view(model: PreTrainedModel, adapter: Adapter, mask_row: Tensor, adapter_name: str) -> PreTrainedModel:
    """A second tree of modules around a model's own parameters and buffers, with a gated adapter. The model is unchanged.

    mask_row [H]: the mask token's row before the adapter's change. Raises ModelError as `insert_gated` does.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(
        model, cast(Any, shared)
    )  # deepcopy returns what the dictionary has: no tensor of it is copied
    if view.config._attn_implementation.startswith("flash"):
        view.set_attn_implementation("sdpa")  # flash attention takes no 4-D mask
    gate, embedding = insert_gated(view, adapter, adapter_name), view.get_input_embeddings()
    # Gemma multiplies its embeddings by a constant.
    scale = cast(Tensor, embedding.embed_scale) if hasattr(embedding, "embed_scale") else torch.ones(())
    row = (mask_row.float() + adapter.row.to(mask_row.device)) * torch.as_tensor(scale).to(mask_row.dtype).item()
    view.set_input_embeddings(MaskRow(embedding, row, adapter.mask_token_id, gate))
    return view.eval()
