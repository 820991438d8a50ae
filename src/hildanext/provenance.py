"""Where a result comes from: versions of the packages that touch the numbers, and the source's revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from hildanext import __version__


def versions() -> dict[str, str]:
    """Versions of what computes: Python and the packages that touch the numbers."""
    names = ("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy")
    return {"hildanext": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def git_revision() -> str | None:
    """Commit of the source checkout this package runs from ('-dirty' with local changes); None outside one."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
