"""Memory of a process that serves: token embeddings in int8, and pages that go back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
from torch import Tensor

DONTNEED = 4  # madvise: drop the pages; those of a file are read again when they are needed


class TokenRows:
    """Rows of a matrix [V, H] by token id: the matrix itself, or with `int8` a copy with a scale for each row."""

    def __init__(self, weight: Tensor, int8: bool) -> None:
        self.int8 = int8
        self.values, self.scale = weight, torch.ones(0)
        if int8:
            weight = weight.detach().float()
            self.scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            self.values = (weight / self.scale).round().to(torch.int8)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., H] float32."""
        flat = ids.to(self.values.device).flatten()  # `index_select` takes a fifth of the time of `values[ids]`
        found = self.values.index_select(0, flat).float()
        if self.int8:
            found *= self.scale.index_select(0, flat)
        return found.view(*ids.shape, -1)


def return_freed_memory() -> None:
    """Return free pages of all heaps to the system; glibc keeps them. Without glibc do nothing. Other threads run meanwhile."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # musl has none
            library.malloc_trim(0)


def release_file_pages(folder: Path) -> None:
    """Drop the resident pages of all files in `folder` that this process has mapped. Outside Linux do nothing."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f" {folder}/" in line:
            first, end = (int(address, 16) for address in line.split(maxsplit=1)[0].split("-"))
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), DONTNEED)
