"""Engines: what answers a request. One file each, the same small protocol; the first that can serve runs.

Reasons why the others cannot are kept and go with every answer.
"""

from __future__ import annotations

from typing import Any

from hildanext.config import Config, EngineName
from hildanext.decoding.engines.protocol import Completion, Engine, Event, Request, Stats, Steps, as_steps
from hildanext.errors import UsageError
from hildanext.progress import say

__all__ = [
    "Completion",
    "Engine",
    "Event",
    "Request",
    "Stats",
    "Steps",
    "as_steps",
    "n_threads",
    "open_base",
    "open_engine",
]


def open_engine(config: Config) -> Engine:
    """Load the first engine of `engine.order` that can serve the model here.

    Raises UsageError with every reason when none can, and for a model that is not there unless the dummy stands alone.
    """
    if set(config.engine.order) != {"dummy"}:
        from hildanext.model.pretrained import locate  # loads transformers, which the dummy alone does without

        # Asked first, so that a mistyped folder is an error even where no engine comes to look into it.
        locate(config.model.base)
    reasons: dict[str, str] = {}
    for name in config.engine.order:
        kind = _engine(name)
        reason = kind.can_serve(config)
        if reason is None:
            engine: Engine = kind(config, reasons)
            warn_block_size(engine, config.decode.block_size)
            return engine
        reasons[name] = reason
    raise UsageError(
        f"no engine can serve '{config.model.base}': "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    )


def n_threads() -> int:
    """torch's threads in the calling thread."""
    import torch

    return torch.get_num_threads()


def open_base(config: Config, threads: int) -> Engine:
    """Load the AR base of the converted checkpoint `model.base`, to compute with `threads` in the calling thread.

    Raises UsageError or ModelError when it cannot be had.
    """
    from hildanext.decoding.engines.ar import ArEngine

    reason = ArEngine.can_serve(config)
    if reason is not None:
        raise UsageError(reason)
    return ArEngine(config, {}, threads)


def warn_block_size(engine: Engine, block_size: int | None) -> None:
    """Say what to expect of a `decode.block_size` that the checkpoint was not trained for."""
    if block_size is not None and engine.trained_block is not None and block_size != engine.trained_block:
        effect = "fewer tokens per forward" if block_size < engine.trained_block else "worse text"
        say(f"decode.block_size {block_size} is not the checkpoint's {engine.trained_block}: expect {effect}")


def _engine(name: EngineName) -> Any:
    # Imported when asked for: an engine's libraries must not slow the others down.
    if name == "dinfer":
        from hildanext.decoding.engines.dinfer import DInferEngine

        return DInferEngine
    if name == "transformers":
        from hildanext.decoding.engines.transformers import TransformersEngine

        return TransformersEngine
    from hildanext.decoding.engines.dummy import DummyEngine

    return DummyEngine
