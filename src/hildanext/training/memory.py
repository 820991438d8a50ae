"""Memory of a training: errors when it runs out, activation checkpointing, peak usage."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hildanext.config import Config
from hildanext.errors import HildaError
from hildanext.model.gated_linear import find_gate


class MemoryShortError(HildaError):
    """A training step does not fit into memory.

    The message names keys that reduce memory: first those that may change on resume, then those that need a new run.
    """

    def __init__(
        self, config: Config, micro_batch: int, step: int, reason: str, processes: int, in_optimizer: bool = False
    ) -> None:
        """step: 1-based. in_optimizer: memory ran out in the optimizer step, after the activations were freed."""
        train, on_resume, new_run = config.train, list[str](), list[str]()
        if micro_batch > 1 and not in_optimizer:
            on_resume.append(f"lower train.micro_batch ({micro_batch})")
        if not train.gradient_checkpointing and not in_optimizer:
            on_resume.append("set train.gradient_checkpointing")
        if processes > 1 and (train.sharding, train.optimizer) == ("none", "adamw"):
            on_resume.append("set train.sharding to 'fsdp2'")
        if train.optimizer != "adafactor":
            new_run.append("train.optimizer 'adafactor'")
        new_run.append("a lora.rank" if in_optimizer else f"a lower data.seq_len ({config.data.seq_len})")
        remedies = [f"{' or '.join(on_resume)}, and continue with --resume"] if on_resume else []
        remedies.append(f"start a new run with {' or '.join(new_run)}")
        super().__init__(
            f"step {step}: out of memory{' in the optimizer' if in_optimizer else ''} ({reason}); "
            f"{'; or '.join(remedies)} ('hildanext preflight' shows what each saves)"
        )


class AllShortError(RuntimeError):
    """At least one process is out of memory. Raised in all processes, so that all repeat the step together."""


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB (10^6 bytes), see `peak_of`."""
    return peak_of(device) / 1e6


def peak_of(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # its ru_maxrss begins with the peak of the process that started this one
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable activation checkpointing: store each layer's input only and recompute the rest in the backward pass.

    A gated model's groups read the clean rows' keys through a cache, which the recomputation reads again.

    On a CPU the C library keeps the memory that a layer frees and fragments it with smaller tensors. Free memory is
    therefore returned to the system before each layer.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    trim = trimmer()
    if trim is not None and model.device.type in ("cpu", "meta"):  # meta: a prediction, see footprint.py
        options["context_fn"] = lambda: (freed_memory_returned(trim), freed_memory_returned(trim))  # forward, recompute
    if find_gate(model) is not None:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._can_checkpoint_with_cache = True  # else transformers leaves the cache out
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # the name in older versions of transformers, such as the last one for Python 3.10
        model.gradient_checkpointing_enable(options)


def trimmer() -> Callable[[int], int] | None:
    """The C library's `malloc_trim`, which returns free pages to the system; None without glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library.malloc_trim if hasattr(library, "malloc_trim") else None


@contextlib.contextmanager
def freed_memory_returned(trim: Callable[[int], int]) -> Iterator[None]:
    """Context manager for activation checkpointing that returns free memory to the system on entry."""
    trim(0)
    yield


def clear_cache(device: torch.device) -> None:
    """Release unused memory that torch's GPU allocator has cached. No effect on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
