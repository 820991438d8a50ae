"""Gives freed memory back to the system. glibc keeps it otherwise, hundreds of megabytes after a model was converted."""

from __future__ import annotations

import ctypes
import gc
import sys


def return_freed_memory() -> None:
    """Collect garbage and return free pages of all heaps to the system. Without glibc only collect."""
    gc.collect()
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # musl has none
            library.malloc_trim(0)
