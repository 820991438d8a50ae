"""Provenance of a result: versions of the packages that affect the numbers, and the revision of the source code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from hildanext import __version__


def versions() -> dict[str, str]:
    """Versions of Python, HildaNext and the packages that affect the numbers, by name."""
    names = ("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy")
    return {"hildanext": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def git_revision() -> str | None:
    """Git commit of the source checkout, with '-dirty' after local changes. None if this file is not in a checkout.

    An installed package can lie inside a repository of its user, in a virtual environment. That one does not track it.
    """
    here = Path(__file__)
    answer = ""
    for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=40"]):
        try:
            found = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        answer = found.stdout.strip()
    return answer
