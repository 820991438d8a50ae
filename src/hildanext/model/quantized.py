"""Quantized frozen weights for QLoRA (Dettmers et al. 2023, arXiv 2305.14314): int8 or nf4 by bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from hildanext.config.lora import Quantization
from hildanext.errors import ConfigError
from hildanext.model.policy import Policy

QUANTIZED_FROM = (6, 0)  # the oldest compute capability that bitsandbytes is built for


def bitsandbytes_config(kind: Quantization, policy: Policy) -> BitsAndBytesConfig:
    """The configuration with which transformers quantizes linear layers at load. Embedding and head are not quantized.

    Raises ConfigError when bitsandbytes is not installed or does not support the device.
    """
    capability = torch.cuda.get_device_capability(policy.device) if policy.device.type == "cuda" else None
    check_quantized(kind, policy.device.type, capability)
    quiet_bitsandbytes()
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=policy.compute,
    )


def check_quantized(kind: Quantization, device_type: str, capability: tuple[int, int] | None) -> None:
    """Raise ConfigError unless bitsandbytes is installed and supports the device. capability: CUDA's, (major, minor)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"'lora.base': '{kind}' needs bitsandbytes; install it with: pip install 'hildanext[quant]', or use 'native'"
        )
    if capability is not None and capability < QUANTIZED_FROM:
        raise ConfigError(
            f"'lora.base': '{kind}' needs compute capability 6.0, but this GPU has {capability[0]}.{capability[1]}; "
            "use 'native'"
        )
    if device_type not in ("cpu", "cuda"):
        raise ConfigError(f"'lora.base': '{kind}' runs on CPUs and NVIDIA GPUs, not on '{device_type}'; use 'native'")


def keep_packing(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking nf4 weights.

    On CPUs with AVX512-BF16, the first forward in eval mode repacks them with coarser scales, and all later steps use
    those. A resumed run would then differ from an uninterrupted one.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__["support_avx512bf16_for_cpu"] = False


def quiet_bitsandbytes() -> None:
    """Hide bitsandbytes' warnings on casts to fp16 in every int8 forward and on missing kernels at its import."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
