"""Memory of a training: what was used, and what to say when it is not enough."""

from __future__ import annotations

import resource
import sys

import torch
from transformers import PreTrainedModel

from hildanext.config import Config
from hildanext.errors import HildaError


class MemoryShortError(HildaError):
    """A training step does not fit. The message names the keys that make it smaller."""

    def __init__(self, config: Config, micro_batch: int, step: int, reason: str) -> None:
        train = config.train
        remedies = [f"lower train.micro_batch ({micro_batch}) and continue with --resume"] if micro_batch > 1 else []
        if not train.gradient_checkpointing:
            remedies.append("set train.gradient_checkpointing")
        if train.optimizer != "adafactor":
            remedies.append("train.optimizer 'adafactor'")
        remedies.append(f"lower data.seq_len ({config.data.seq_len})")
        super().__init__(
            f"step {step}: out of memory ({reason}); {', '.join(remedies)} ('hildanext preflight' tells what each gains)"
        )


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB: the GPU's allocations, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep a layer's input only and compute the rest again in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its old name, in the last transformers for Python 3.10
        model.gradient_checkpointing_enable()


def clear_cache(device: torch.device) -> None:
    """Give back what the allocator holds and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
