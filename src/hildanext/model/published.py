"""Published diffusion models in layouts of their own, read as stock architectures of transformers: SDAR and LLaDA2.x.

Their code is never run. SDAR is Qwen3 under another name, SDAR-MoE Qwen3-MoE (arXiv 2510.06303). A LLaDA2.x without experts is a Qwen3 that
rotates only a part of each head, and stores queries, keys and values as one matrix. Both predict token i at position i.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3MoeConfig

from hildanext.errors import ModelError

LAYOUTS = ("sdar", "sdar_moe", "llada2_moe")  # their model_type
STOCK: dict[str, type[PreTrainedConfig]] = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
# What LLaDA2.x leaves to its decoding code, where it is written as constants.
LLADA2_BLOCK, LLADA2_MASK = 32, 156895
LLADA2_NAMES = (  # parts of a tensor's name -> of the stock model's
    ("model.word_embeddings.", "model.embed_tokens."),
    (".attention.dense.", ".self_attn.o_proj."),
    (".attention.query_layernorm.", ".self_attn.q_norm."),
    (".attention.key_layernorm.", ".self_attn.k_norm."),
)
FUSED = ".attention.query_key_value."


def as_stock(stored: dict[str, Any], name: str) -> dict[str, Any]:
    """config.json of a model, those of SDAR and LLaDA2.x as the stock architecture's with `hilda`, our record.

    Raises ModelError for a model of these families that has no stock architecture, or no block size or mask token.
    """
    if stored.get("model_type") not in LAYOUTS:
        return stored
    try:
        config = _llada2(stored, name) if stored["model_type"] == "llada2_moe" else _sdar(stored)
    except KeyError as error:
        raise ModelError(f"model '{name}': config.json has no {error}; restore it") from None
    for key in ("block_size", "mask_token_id"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ModelError(f"model '{name}': config.json has no {key}, which decoding needs; add it")
    record = {
        "base_model": name,
        "base_revision": None,
        "convention": "in_place",
        "tokens_trained": 0,
        "published": stored["model_type"],
    }
    return config | {"hilda": stored.get("hilda", record)}


def _qwen3(stored: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The keys that Qwen3 has, and what is different."""
    kind = changes.get("model_type", "qwen3")
    known = {field.name for field in dataclasses.fields(STOCK[kind])} - {"transformers_version", "dtype"}
    kept = {key: value for key, value in stored.items() if key in known}
    return kept | {"architectures": ["Qwen3ForCausalLM"], "model_type": kind} | changes


def _sdar(stored: dict[str, Any]) -> dict[str, Any]:
    scaling = stored.get("rope_scaling") or {"rope_type": "default"}
    experts: dict[str, Any] = {}
    if stored["model_type"] == "sdar_moe":
        experts = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_local_experts": stored["num_experts"],
        }
    return _qwen3(
        stored,
        **experts,
        rope_parameters=scaling | {"rope_theta": stored["rope_theta"]},
        block_size=stored.get("block_size"),
        mask_token_id=stored.get("mask_token_id"),
    )


def _llada2(stored: dict[str, Any], name: str) -> dict[str, Any]:
    """Half of each head turns, by angles position / theta^(2j/r), j < r/2, r the rotated width. The stock rotation
    `proportional` has theta'^(2j/d) for a head of width d: theta' = theta^(d/r)."""
    if not is_published(stored):
        raise ModelError(f"model '{name}': a LLaDA2.x with experts, which only the engine 'dinfer' loads")
    for key, default, wanted in (
        ("norm_head", False, False),
        ("use_bias", False, False),
        ("use_qkv_bias", False, False),
        ("use_qk_norm", True, True),
    ):
        if stored.get(key, default) != wanted:
            raise ModelError(f"model '{name}': {key} is {stored[key]}, which the stock architecture does not have")
    head_dim = stored.get("head_dim") or stored["hidden_size"] // stored["num_attention_heads"]
    part = stored["rotary_dim"] / head_dim if "rotary_dim" in stored else stored.get("partial_rotary_factor", 0.5)
    return _qwen3(
        stored,
        num_key_value_heads=stored["num_key_value_heads"] or stored["num_attention_heads"],
        head_dim=head_dim,
        rope_parameters={
            "rope_type": "proportional",
            "rope_theta": float(stored["rope_theta"]) ** (1 / part),
            "partial_rotary_factor": part,
        },
        block_size=stored.get("block_size", LLADA2_BLOCK),
        mask_token_id=stored.get("mask_token_id", LLADA2_MASK),
    )


def is_published(stored: dict[str, Any]) -> bool:
    """Whether config.json is one of SDAR's, or of a LLaDA2.x without experts; dInfer loads those with experts itself."""
    kind = stored.get("model_type")
    is_dense = stored.get("first_k_dense_replace", 0) >= stored.get("num_hidden_layers", math.inf)
    return kind in LAYOUTS and (kind != "llada2_moe" or is_dense)


def stock_config(stored: dict[str, Any]) -> PreTrainedConfig:
    """The configuration object of a dictionary from `as_stock`."""
    return STOCK[stored["model_type"]](
        **{key: value for key, value in stored.items() if key not in ("model_type", "hilda")}
    )


def llada2_weights(files: list[Path], config: Qwen3Config) -> dict[str, Tensor]:
    """The tensors of a dense LLaDA2.x under Qwen3's names: queries, keys and values apart, each head in Qwen3's order."""
    heads, shared = config.num_attention_heads * config.head_dim, (config.num_key_value_heads or 0) * config.head_dim
    order, found = _head_order(config), dict[str, Tensor]()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                tensor = file.get_tensor(name)
                if FUSED in name:
                    parts = torch.split(tensor, [heads, shared, shared])
                    for kind, part in zip("qkv", parts, strict=True):
                        turned = (
                            part if kind == "v" else part.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1)
                        )
                        found[name.replace(FUSED, f".self_attn.{kind}_proj.")] = turned.contiguous()
                    continue
                for old, new in LLADA2_NAMES:
                    name = name.replace(old, new)
                found[name] = tensor[order] if name.endswith(("q_norm.weight", "k_norm.weight")) else tensor
    return found


def _head_order(config: Qwen3Config) -> list[int]:
    """The entries of a LLaDA2.x head in the order in which Qwen3 has them.

    LLaDA2.x turns entries j and j + r/2, the first r of a head; Qwen3 turns j and j + d/2, d the head's width.
    """
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    width, half = config.head_dim, config.head_dim // 2
    turned = int(rope["partial_rotary_factor"] * width)
    still, rest = list(range(turned, width)), half - turned // 2
    return [*range(turned // 2), *still[:rest], *range(turned // 2, turned), *still[rest:]]


def mark_mask(tokenizer: PreTrainedTokenizerBase, mask_token_id: int, name: str) -> None:
    """Make the token that the configuration names the tokenizer's mask token. Raises ModelError if there is none."""
    if tokenizer.mask_token_id == mask_token_id:
        return
    token = tokenizer.convert_ids_to_tokens(mask_token_id)
    if token is None:
        raise ModelError(f"model '{name}': its tokenizer has no token {mask_token_id}, the mask token of config.json")
    tokenizer.add_special_tokens({"mask_token": token})
