"""Tiny converted checkpoints to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hildanext.config import ModelConfig
from hildanext.config.model import Convention
from hildanext.model.loading import load_diffusion_lm, save_diffusion_lm
from support.models import make_tokenizer

BLOCK = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.35,  # decided enough that thresholds matter
    "bos_token_id": None,
}


def tiny_qwen3(rows: int, tied: bool = False, rope_theta: float = 5000.0, **changes: Any) -> Qwen3ForCausalLM:
    """A random Qwen3 with `rows` rows of embeddings."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    config = Qwen3Config(vocab_size=rows, tie_word_embeddings=tied, rope_parameters=rope, **SIZES | changes)
    return Qwen3ForCausalLM(config).eval()


def tiny_qwen3_moe(rows: int, **changes: Any) -> Qwen3MoeForCausalLM:
    """A random Qwen3 with four experts a layer, of which a token takes two."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=rows, rope_parameters=rope, **SIZES | experts | changes)
    ).eval()


def tiny_llama(rows: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES)).eval()


def write_checkpoint(
    folder: Path, model: PreTrainedModel, convention: Convention = "in_place", shard: str | None = None, **special: Any
) -> Path:
    """A model as a converted checkpoint with blocks of 4. shard: largest size of a file. special: the tokenizer's tokens."""
    tokenizer = make_tokenizer(**special)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = ModelConfig(base=str(folder / "base"), device="cpu", dtype="float32", convention=convention)
    lm, _ = load_diffusion_lm(config)
    lm.block_size = BLOCK
    save_diffusion_lm(lm, folder / "model")
    if shard is not None:
        (folder / "model" / "model.safetensors").unlink()
        lm.model.save_pretrained(folder / "shards", max_shard_size=shard)
        for path in (folder / "shards").glob("model*"):
            path.rename(folder / "model" / path.name)
    return folder / "model"
