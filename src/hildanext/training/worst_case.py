"""The most expensive micro-batch of a training, with random weights and without data.

Every row is one document of full length whose tokens are all noised and supervised. `footprint.py` predicts and
measures the memory of this micro-batch; the benchmarks also measure its time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hildanext.config import Config, ModelConfig
from hildanext.diffusion import objective
from hildanext.diffusion.groups import Groups, place_groups
from hildanext.diffusion.masks import Pieces
from hildanext.errors import ConfigError
from hildanext.model.backbone import body
from hildanext.model.diffusion_lm import Batch
from hildanext.model.gate import clean_forward, draft_states, group_forward, inject_gated
from hildanext.model.lora import inject
from hildanext.model.policy import Policy
from hildanext.model.pretrained import locate
from hildanext.model.training_attention import Kind, Visible, visible_keys
from hildanext.training.memory import checkpoint_activations

Command = Literal["convert-wsd", "sft", "dpo"]


def shape_of(model: ModelConfig) -> PreTrainedConfig:
    """The architecture of a model, without its weights. Raises UsageError if the model does not exist."""
    place, gguf = locate(model.base)
    shape: PreTrainedConfig = AutoConfig.from_pretrained(
        place,
        gguf_file=gguf,
        revision=model.revision or "main",
        trust_remote_code=model.trust_remote_code,
    )
    return shape


class WorstRows(NamedTuple):
    """Inputs of the micro-batch: B rows of width W = L (x_t alone) or 2L ([x_t ; x_0]), S supervised positions.

    In dpo, B counts two answers per pair and noise draw.
    """

    ids: Tensor  # [B, W] int64
    position_ids: Tensor  # [B, W] int64
    labels: Tensor  # [S] int64
    places: tuple[Tensor, Tensor]  # row and column of the S hidden states that the head reads
    visible: Visible
    mask_bytes: int  # size of the masks in `visible`


def worst_rows(
    config: Config, command: Command, policy: Policy, shape: PreTrainedConfig, device: torch.device
) -> WorstRows:
    """The inputs as real tensors on `device`; they are small."""
    length, n_rows = config.data.seq_len, config.train.micro_batch
    if command == "dpo":
        n_rows *= 2 * config.dpo.draws * (2 if config.dpo.complementary else 1)
    # Rows with a clean stream cost most, so take the smallest block size of the schedule.
    block_size = min(config.wsd.final_block, config.wsd.start_block)
    if command != "convert-wsd":
        tune = config.sft if command == "sft" else config.dpo
        block_size = tune.block_size or config.wsd.final_block
    streams = 1 if block_size >= length else 2
    text = shape.get_text_config()
    heads: int = text.num_attention_heads
    groups = heads // (text.to_dict().get("num_key_value_heads") or heads)
    doc_ids = torch.zeros(n_rows, length, dtype=torch.int64, device=device)
    position_ids = torch.arange(length, device=device).expand(n_rows, length).contiguous()
    visible = visible_keys(attention_kind(config, policy), doc_ids, position_ids, block_size, policy.compute, groups)
    masks = [visible] if isinstance(visible, Tensor) else visible.masks if isinstance(visible, Pieces) else []
    supervised = position_ids > 0
    row, column = supervised.nonzero(as_tuple=True)
    ids = (torch.arange(length, device=device) % text.vocab_size).expand(n_rows, length)
    return WorstRows(
        ids.repeat(1, streams),
        position_ids.repeat(1, streams),
        ids[supervised],
        (row, column - 1),
        visible,
        sum(mask.nbytes for mask in masks),
    )


class WorstGroups(NamedTuple):
    """Inputs of the micro-batch with a gated adapter: every group has its full size and every row a label."""

    batch: Batch
    groups: Groups
    k: int  # rows in a group
    labels: Tensor  # [S] int64
    places: tuple[Tensor, Tensor]  # row and group row of the S supervised ones
    label_columns: Tensor  # [S] int64: columns of the labels
    mask_bytes: int


def worst_groups(
    config: Config, command: Command, policy: Policy, shape: PreTrainedConfig, device: torch.device
) -> WorstGroups:
    """The inputs as real tensors on `device`; they are small."""
    length, n_rows = config.data.seq_len, config.train.micro_batch
    k = config.wsd.peak_block or config.wsd.final_block
    if command == "sft":
        k = config.sft.block_size or config.wsd.final_block
    n = min(config.noise.anchors, max(length - 2, 1))
    positions, docs = torch.arange(length), torch.zeros(length, dtype=torch.int64)
    ids, allowed = positions % shape.get_text_config().vocab_size, torch.ones(length, dtype=torch.bool)
    anchors = torch.arange(n) * max(length - k - 1, 1) // n
    placed = place_groups(ids, docs, positions, allowed, anchors, torch.full((n,), k), n * k, 0)
    groups = Groups(*(tensor.expand(n_rows, -1).contiguous().to(device) for tensor in placed))
    ids, docs, positions, allowed = (
        x.expand(n_rows, -1).contiguous().to(device) for x in (ids, docs, positions, allowed)
    )
    mask_bytes = n_rows * policy.compute.itemsize * (length * length + n * k * (length + n * k))
    row, column = groups.wanted.nonzero(as_tuple=True)
    labels, columns = groups.labels[row, column], groups.labels_at[row, column]
    batch = Batch(list(range(n_rows)), ids, docs, positions, allowed)
    return WorstGroups(batch, groups, k, labels, (row, column), columns, mask_bytes)


def attention_kind(config: Config, policy: Policy) -> Kind:
    """The training attention that a run uses if the model supports it, see `attention_choice`.

    Raises ConfigError for 'flex' on a CPU.
    """
    asked = config.train.attention
    if asked == "dense" or config.model.attention != "sdpa":
        return "dense"
    kind = policy.attention if asked == "auto" else asked
    if kind == "flex" and policy.device.type == "cpu":
        raise ConfigError("'train.attention': 'flex' has no backward on a CPU; use 'auto'")
    return kind


def random_model(shape: PreTrainedConfig, config: Config, policy: Policy) -> PreTrainedModel:
    """A model with random weights on the default device: in the compute type if they are frozen, else in fp32."""
    dtype = torch.float32 if config.lora.rank is None else policy.compute
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        shape, dtype=dtype, attn_implementation=config.model.attention
    )
    return model


def prepare(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """Add the adapter and activation checkpointing that the configuration asks for, and switch to training mode."""
    if config.lora.rank is not None:
        (inject_gated if config.lora.gate else inject)(model, config.lora, 0, seed=0)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def build(shape: PreTrainedConfig, config: Config, policy: Policy) -> PreTrainedModel:
    """A real model to measure with, on the policy's device."""
    model = random_model(shape, config, policy)
    cast(nn.Module, model).to(policy.device)
    return prepare(model, config)


def forward_backward(
    model: PreTrainedModel, rows: WorstRows | WorstGroups, config: Config, policy: Policy, command: Command
) -> None:
    """Forward, loss and backward as in a training, on inputs made beforehand."""
    autocast: AbstractContextManager[object] = nullcontext()
    if policy.compute != torch.float32:
        autocast = torch.autocast(model.device.type, dtype=policy.compute, cache_enabled=False)
    if isinstance(rows, WorstGroups):
        with autocast:
            loss = _group_loss(model, rows, config)
        loss.backward()
        return
    dense = isinstance(rows.visible, Tensor)
    with autocast:
        embeds = model.get_input_embeddings()(rows.ids)  # a variable, because the measured peak includes it
        hidden = body(
            model,
            inputs_embeds=embeds,
            attention_mask=rows.visible if dense else None,
            position_ids=rows.position_ids,
            **({} if dense else {"visible": rows.visible}),
        )[rows.places]
        loss = _loss(hidden, cast(nn.Module, model.get_output_embeddings()), rows.labels, config, command)
    loss.backward()


def _group_loss(model: PreTrainedModel, rows: WorstGroups, config: Config) -> Tensor:
    batch, groups = rows.batch, rows.groups
    clean = clean_forward(model, batch)
    own = group_forward(model, batch, groups, clean, config.lora.causal_groups)
    states = draft_states(model, batch, groups, rows.k, own)
    hidden, labels = states[rows.places], rows.labels
    ones, head = torch.ones(len(labels), device=hidden.device), cast(nn.Module, model.get_output_embeddings())
    soft = None
    if config.loss.distill:
        taught = clean.hidden[rows.places[0], rows.label_columns - 1]
        soft = objective.Soft(taught, lambda h: head(h).float(), ones)
    target = objective.Target(labels, ones, ones.bool(), ~ones.bool())
    loss, _, _ = objective.denoising_loss(
        hidden, head, target, len(labels), objective.Weights(), mask_token_id=0, soft=soft
    )
    return loss.total


def _loss(hidden: Tensor, head: nn.Module, labels: Tensor, config: Config, command: Command) -> Tensor:
    n = len(labels)
    ones = torch.ones(n, device=hidden.device)
    if command == "dpo":
        objective.predict(hidden.detach(), head, labels)
        return objective.weighted_cross_entropy(hidden, head, labels, ones)
    masked = torch.ones(n, dtype=torch.bool, device=hidden.device)
    cap = config.sft.cap_weight if command == "sft" else config.loss.cap_weight
    target, weights = objective.Target(labels, ones, masked, ~masked), objective.Weights(cap_weight=cap)
    loss, _, _ = objective.denoising_loss(hidden, head, target, n, weights, mask_token_id=0)
    return loss.total


def n_backwards(config: Config, command: Command) -> int:
    """Backward passes until memory peaks: 2 if a step has several, since later ones run beside existing gradients."""
    if config.lora.gate:
        return 2 if config.train.rows_per_step > config.train.micro_batch else 1
    turns = {
        "convert-wsd": config.noise.turns + config.noise.complementary,
        "sft": config.sft.turns + config.sft.complementary,
        "dpo": 1,
    }[command]
    return 2 if turns > 1 or config.train.rows_per_step > config.train.micro_batch else 1
