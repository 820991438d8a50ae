"""One policy from the hardware to device and number format. Pascal (sm_6x) gets fp16 or fp32, never bf16."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from hildanext.errors import ConfigError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Policy(NamedTuple):
    """Device and compute type; weights in training are always fp32 (autocast computes in `compute`)."""

    device: torch.device
    compute: torch.dtype
    reason: str

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """accelerate's name: fp16 brings a loss scaler."""
        return {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.compute]  # type: ignore[return-value]


def native_dtype(device_type: str, capability: tuple[int, int] | None, cpu_bf16: bool) -> tuple[torch.dtype, str]:
    """The fastest safe compute type: (dtype, reason). `capability` is CUDA's (major, minor)."""
    if device_type == "cuda" and capability is not None:
        name = f"sm_{capability[0]}{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"{name} has native bf16"
        return torch.float16, f"{name} has no bf16: fp16 with a loss scaler"
    if device_type == "cpu" and cpu_bf16:
        return torch.bfloat16, "this CPU multiplies bf16 matrices natively"
    return torch.float32, f"{device_type} without native bf16"


def choose_policy(device: str = "auto", dtype: DtypeName = "auto") -> Policy:
    """Resolve 'auto' on this machine. Raises ConfigError for a device or format that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"'model.device': unknown device {device!r}; use 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"
        ) from None
    has_gpu = torch.cuda.is_available() and (target.index or 0) < torch.cuda.device_count()
    available = {"cpu": True, "cuda": has_gpu, "mps": torch.backends.mps.is_available()}
    if not available.get(target.type, False):
        raise ConfigError(f"'model.device': {device!r} is not available on this machine; use 'auto' or 'cpu'")
    capability = torch.cuda.get_device_capability(target) if target.type == "cuda" else None
    cpu_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == "auto":
        return Policy(target, *native_dtype(target.type, capability, cpu_bf16))
    if dtype == "bfloat16" and capability is not None and capability < (8, 0):
        raise ConfigError(
            f"'model.dtype': bfloat16 is not native on sm_{capability[0]}{capability[1]}; use 'float16' or 'auto'"
        )
    if dtype == "float16" and target.type == "cpu":
        raise ConfigError("'model.dtype': float16 is for GPUs; use 'bfloat16', 'float32' or 'auto' on a CPU")
    return Policy(target, DTYPES[dtype], "asked for in the configuration")
