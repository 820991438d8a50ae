"""The part of train.py that needs a CUDA device: utilisation, FlexAttention against the dense mask, presets in 8 GB."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from hildanext.config import Config, apply_overrides, parse_config
from hildanext.model.policy import choose_policy
from hildanext.model.training_attention import use_training_attention, visible_keys
from hildanext.training.footprint import measure, peak_of, start_peak
from hildanext.training.optimizer import make_optimizer
from hildanext.training.preflight import policy_of
from hildanext.training.worst_case import build, forward_backward, worst_rows

# Dense bf16 FLOP/s by device name, from the vendors' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def config_for(length: int, micro_batch: int, **train: Any) -> Config:
    return parse_config(
        {
            "model": {"base": "Qwen/Qwen3-0.6B", "device": "cuda"},
            "data": {"seq_len": length},
            "wsd": {"start_block": 32, "final_block": 32},
            "train": {"rows_per_step": micro_batch, "micro_batch": micro_batch} | train,
        }
    )


def dense_flops(shape: PreTrainedConfig, length: int, micro_batch: int) -> float:
    """FLOPs of a step without skipping: 6 per weight and token over [x_t ; x_0], full attention, the head at x_t."""
    s: Any = shape
    heads = s.num_attention_heads * s.head_dim
    layer = s.hidden_size * (2 * heads + 2 * s.num_key_value_heads * s.head_dim + 3 * s.intermediate_size)
    tokens = 2 * length * micro_batch
    attention = 12 * s.num_hidden_layers * heads * 2 * length * tokens
    return (
        6 * s.num_hidden_layers * layer * tokens + attention + 6 * s.hidden_size * s.vocab_size * length * micro_batch
    )


def step_seconds(config: Config, shape: PreTrainedConfig, kind: str, steps: int = 12) -> float:
    """Median seconds of a step. The first third of the steps, which compile, is not counted."""
    policy = choose_policy("cuda")
    rows = worst_rows(config, "convert-wsd", policy, shape, policy.device)
    length, micro = config.data.seq_len, config.train.micro_batch
    docs = torch.zeros(micro, length, dtype=torch.int64, device="cuda")
    positions = rows.position_ids[:, :length]
    groups = shape.num_attention_heads // shape.num_key_value_heads
    visible = visible_keys(kind, docs, positions, 32, policy.compute, groups)  # type: ignore[arg-type]
    rows = rows._replace(visible=visible)
    model = build(shape, config, policy)
    if kind != "dense":
        use_training_attention(model)
    optimizer = make_optimizer(model, config.train, policy.fused)
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        forward_backward(model, rows, config, policy, "convert-wsd")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[steps // 3 :])


def fits_in_8_gb(preset: Path, shape: PreTrainedConfig, card: str | None) -> dict[str, Any]:
    """Run steps of a preset with micro-batches accumulated and the allocator limited to 8 GB minus the CUDA context.

    card: use the number format and attention of another card, for example Pascal's fp16 and pieces; None: of this card.
    """
    raw = json.loads(preset.read_text(encoding="utf-8"))
    config = parse_config(apply_overrides(raw, ["model.device=cuda", "data.seq_len=1024"]))
    policy = policy_of(config.model, card)
    setup = {"as_on": card or "this card", "dtype": str(policy.compute), "attention": policy.attention}
    torch.cuda.empty_cache()
    outside = start_peak(policy.device)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((8e9 - outside) / total)
    try:
        return setup | {"fits": True, "peak": measure(config, "convert-wsd", policy, shape)}
    except torch.OutOfMemoryError:
        return setup | {"fits": False, "peak": outside + peak_of(policy.device)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure_gpu(qwen3: Callable[[str], PreTrainedConfig]) -> dict[str, Any]:
    name, shape = torch.cuda.get_device_name(), qwen3("0.6b")
    peak = next((flops for part, flops in PEAKS.items() if part in name), None)
    config = config_for(1024, 8)
    seconds = step_seconds(config, shape, "flex")
    flops = dense_flops(shape, 1024, 8) / seconds
    long = config_for(4096, 1)
    configs = Path(__file__).parents[1] / "configs"
    return {
        "device": name,
        "tokens_per_second": 8 * 1024 / seconds,
        "mfu": None if peak is None else flops / peak,
        "flex_over_dense": step_seconds(long, shape, "dense") / step_seconds(long, shape, "flex"),
        "budget": {
            preset: fits_in_8_gb(configs / f"{preset}.json", qwen3(size), card)
            for preset, size, card in (("qwen3-0.6b-gtx1080", "0.6b", "sm_61"), ("qwen3-1.7b-lora-8gb", "1.7b", None))
        },
    }
