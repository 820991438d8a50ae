"""Memory of a training: what was used, and what to say when it is not enough."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from hildanext.config import Config
from hildanext.errors import HildaError


class MemoryShortError(HildaError):
    """A training step does not fit. The message names the keys that make it smaller: those that a run may change when it is
    resumed, then those that need a new run."""

    def __init__(
        self, config: Config, micro_batch: int, step: int, reason: str, processes: int, in_optimizer: bool = False
    ) -> None:
        """in_optimizer: it was the optimizer that found no room, when the activations were gone."""
        train, resumed, anew = config.train, list[str](), list[str]()
        if micro_batch > 1 and not in_optimizer:
            resumed.append(f"lower train.micro_batch ({micro_batch})")
        if not train.gradient_checkpointing and not in_optimizer:
            resumed.append("set train.gradient_checkpointing")
        if processes > 1 and (train.sharding, train.optimizer) == ("none", "adamw"):
            resumed.append("set train.sharding to 'fsdp2'")
        if train.optimizer != "adafactor":
            anew.append("train.optimizer 'adafactor'")
        anew.append("a lora.rank" if in_optimizer else f"a lower data.seq_len ({config.data.seq_len})")
        remedies = [f"{' or '.join(resumed)}, and continue with --resume"] if resumed else []
        remedies.append(f"start a new run with {' or '.join(anew)}")
        super().__init__(
            f"step {step}: out of memory{' in the optimizer' if in_optimizer else ''} ({reason}); {'; or '.join(remedies)} "
            "('hildanext preflight' tells what each gains)"
        )


class AllShortError(RuntimeError):
    """Some process is out of memory, and all of them know."""


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB: the GPU's allocations, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep a layer's input only and compute the rest again in the backward pass.

    On a CPU the C library would keep what a layer frees and cut it up for smaller tensors: it goes back before each layer.
    """
    how: dict[str, Any] = {"use_reentrant": False}
    trim = trimmer()
    if trim is not None and model.device.type in ("cpu", "meta"):  # meta: a prediction
        how["context_fn"] = lambda: (given_back(trim), given_back(trim))  # in the forward, and when computed again
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how)
    else:  # its old name, in the last transformers for Python 3.10
        model.gradient_checkpointing_enable(how)


def trimmer() -> Callable[[int], int] | None:
    """What makes the C library give free pages back to the system; None where it cannot (only glibc can)."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library.malloc_trim if hasattr(library, "malloc_trim") else None


@contextlib.contextmanager
def given_back(trim: Callable[[int], int]) -> Iterator[None]:
    """Within it, memory that was free before belongs to the system."""
    trim(0)
    yield


def clear_cache(device: torch.device) -> None:
    """Give back what the allocator holds and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
