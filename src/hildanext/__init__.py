"""HildaNext: autoregressive language models in, editable block-diffusion language models out.

From Python: `load` opens a model, `exact` decodes beside a model of transformers. Both import torch at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hildanext.api import LogProbability, Model, load
    from hildanext.decoding.custom_generate import exact
    from hildanext.decoding.events import Finished, Stats, Step
    from hildanext.terminal.notebook import Completion

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Finished",
    "LogProbability",
    "Model",
    "Stats",
    "Step",
    "__version__",
    "exact",
    "load",
]

_MODULES = {
    "Completion": "terminal.notebook",
    "Finished": "decoding.events",
    "LogProbability": "api",
    "Model": "api",
    "Stats": "decoding.events",
    "Step": "decoding.events",
    "exact": "decoding.custom_generate",
    "load": "api",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import hildanext` itself takes milliseconds."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hildanext' has no attribute '{name}'")
    from hildanext.environment import without_reports

    without_reports()  # before the libraries are imported
    return getattr(importlib.import_module(f"hildanext.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
