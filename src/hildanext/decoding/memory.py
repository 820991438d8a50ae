"""Gives freed memory back to the system. glibc keeps it otherwise, hundreds of megabytes after a model was converted."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Return free pages of all heaps to the system. Without glibc do nothing. Other threads run meanwhile."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # musl has none
            library.malloc_trim(0)
