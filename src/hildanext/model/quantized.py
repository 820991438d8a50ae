"""QLoRA's frozen weights (Dettmers et al. 2023, arXiv 2305.14314): int8 or nf4 through bitsandbytes, the extra `quant`."""

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
    """What transformers quantizes the linear layers with while it loads them. Embedding and head stay as they are.

    Raises ConfigError when bitsandbytes is not installed or does not run on the device.
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
    """Raise ConfigError unless bitsandbytes is there and runs on this device. `capability`: CUDA's (major, minor)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"'lora.base': '{kind}' needs bitsandbytes; install it with: pip install 'hildanext[quant]', or use 'native'"
        )
    if capability is not None and capability < QUANTIZED_FROM:
        raise ConfigError(
            f"'lora.base': '{kind}' needs compute capability 6.0, and this GPU has {capability[0]}.{capability[1]}; use 'native'"
        )
    if device_type not in ("cpu", "cuda"):
        raise ConfigError(f"'lora.base': '{kind}' runs on CPUs and NVIDIA GPUs, not on '{device_type}'; use 'native'")


def keep_packing(model: PreTrainedModel) -> None:
    """Keep nf4 weights as they were quantized. On CPUs with AVX512-BF16 a forward in eval mode would pack them anew, with
    coarser scales, and later steps would train beside those: a resumed run would differ from one that never stopped."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__["support_avx512bf16_for_cpu"] = False


def quiet_bitsandbytes() -> None:
    """It says in every forward that int8 casts to fp16, and at its import that optional kernels are missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
