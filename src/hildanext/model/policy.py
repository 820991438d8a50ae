"""The policy of a machine: device, number format, loss scaler, attention kernel, compiler and optimizer.

Everything is decided at the start, and nothing falls back later. Pascal (sm_6x) gets fp16 with a loss scaler or fp32,
SDPA in pieces, no Triton and never bf16.
"""

from __future__ import annotations

import contextlib
import importlib.util
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hildanext.errors import ConfigError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLEX_FROM = (8, 0)  # FlexAttention's kernels need the shared memory and bf16 of Ampere


class Policy(NamedTuple):
    """Device and number formats. Weights in training are float32, and autocast computes in `compute`."""

    device: torch.device
    compute: torch.dtype
    reason: str  # for the choice of `compute`
    attention: Literal["flex", "pieces"] = "pieces"  # in training, see `training_attention`
    fused: bool = False  # whether the optimizer updates all weights in one kernel

    @property
    def mixed_precision(self) -> Literal["no", "bf16", "fp16"]:
        """accelerate's name for `compute`. With fp16 accelerate adds a loss scaler."""
        return {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.compute]  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which a training's forward computes in `compute`, like `Accelerator.autocast`."""
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        # A forward uses each weight once, so a cache of cast weights would only cost memory.
        return torch.autocast(self.device.type, self.compute, cache_enabled=False)

    @property
    def compile(self) -> bool:
        """Whether training compiles kernels. Only FlexAttention needs it: uncompiled, it stores every score."""
        return self.attention == "flex"

    def as_dict(self) -> dict[str, object]:
        """The policy as JSON values, for logs and `/health`."""
        return {
            "device": str(self.device),
            "dtype": str(self.compute).removeprefix("torch."),
            "loss_scaler": self.compute == torch.float16,
            "training_attention": self.attention,
            "compile": self.compile,
            "fused_optimizer": self.fused,
            "reason": self.reason,
        }


def native_dtype(device_type: str, capability: tuple[int, int] | None, cpu_bf16: bool) -> tuple[torch.dtype, str]:
    """The fastest safe compute dtype, with the reason. capability: CUDA's (major, minor)."""
    if device_type == "cuda" and capability is not None:
        name = f"sm_{capability[0]}{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"{name} has native bf16"
        return torch.float16, f"{name} has no bf16: fp16 with a loss scaler"
    if device_type == "cpu" and cpu_bf16:
        return torch.bfloat16, "this CPU multiplies bf16 matrices natively"
    return torch.float32, f"{device_type} without native bf16"


def policy_for(
    device: torch.device, capability: tuple[int, int] | None, compute: torch.dtype, reason: str, has_triton: bool
) -> Policy:
    """Derive the policy from device, CUDA's compute capability and compute dtype, without querying the machine."""
    flex = capability is not None and capability >= FLEX_FROM and has_triton and compute != torch.float32
    return Policy(device, compute, reason, "flex" if flex else "pieces", fused=device.type in ("cpu", "cuda"))


def choose_policy(device: str = "auto", dtype: DtypeName = "auto") -> Policy:
    """Resolve 'auto' on this machine. Raises ConfigError for an unavailable device or number format."""
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
    if capability is not None:
        check_build(capability, torch.cuda.get_arch_list())
    cpu_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    has_triton = importlib.util.find_spec("triton") is not None
    if dtype == "auto":
        compute, reason = native_dtype(target.type, capability, cpu_bf16)
        return policy_for(target, capability, compute, reason, has_triton)
    if dtype == "bfloat16" and capability is not None and capability < (8, 0):
        raise ConfigError(
            f"'model.dtype': bfloat16 is not native on sm_{capability[0]}{capability[1]}; use 'float16' or 'auto'"
        )
    if dtype == "float16" and target.type == "cpu":
        raise ConfigError("'model.dtype': float16 is for GPUs; use 'bfloat16', 'float32' or 'auto' on a CPU")
    return policy_for(target, capability, DTYPES[dtype], "asked for in the configuration", has_triton)


def check_build(capability: tuple[int, int], architectures: list[str]) -> None:
    """Raise ConfigError when this build of torch has no kernels for a GPU. Current wheels leave old GPUs out.

    architectures: torch.cuda.get_arch_list(), for example ['sm_50', 'sm_60', 'compute_90']. Binaries (sm_XY) run on
    GPUs of the same major version with at least their minor version. PTX (compute_XY) runs on all newer GPUs.
    """
    major, minor = capability
    for name in architectures:
        kind, _, number = name.rstrip("abcdefghijklmnopqrstuvwxyz").partition("_")
        if not number.isdigit():
            continue
        built = divmod(int(number), 10)
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return
    raise ConfigError(
        f"'model.device': this torch ({torch.__version__}) has no kernels for sm_{major}{minor}; install a build that "
        "has them (CUDA 12.6 wheels are the last for Pascal and Volta), or set model.device to 'cpu'"
    )


_OUT_OF_MEMORY = (
    " out of memory.",  # CUDA, ROCm, XPU
    "MPS backend out of memory",
    "can't allocate memory",  # torch's allocator on CPUs
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # cuDNN's report when its workspace does not fit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised `error` because memory ran out: by its type on GPUs, else by the allocator's message."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of operations on `tensor`: autocast's if it is enabled, else the tensor's."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
