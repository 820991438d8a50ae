"""Engines: one file for each, all behind the protocol in `protocol.py`. The first one that can serve the model runs.

The reasons why the others cannot are part of every completion.
"""

from __future__ import annotations

from typing import Any

from hildanext.config import SHIPPED_MODEL, Config, EngineName
from hildanext.decoding.engines.protocol import (
    AS_USUAL,
    Completion,
    Engine,
    Event,
    Prompt,
    Rendering,
    Request,
    Stats,
    Steps,
    as_steps,
)
from hildanext.errors import UsageError
from hildanext.progress import say

__all__ = [
    "AS_USUAL",
    "Completion",
    "Engine",
    "Event",
    "Prompt",
    "Rendering",
    "Request",
    "Stats",
    "Steps",
    "as_steps",
    "is_dummy_chosen",
    "n_threads",
    "open_base",
    "open_engine",
    "say_passed_over",
]


def is_dummy_chosen(config: Config) -> bool:
    """Whether `engine.order` lists the dummy alone. Otherwise the dummy only stands in for a missing model."""
    return set(config.engine.order) == {"dummy"}


def open_engine(config: Config, *, stand_in: bool = False) -> Engine:
    """Load the first engine of `engine.order` that can serve the model on this machine.

    The dummy answers if the order lists it alone. With `stand_in` it also answers, if listed, when the weights of the
    shipped model are not installed. It never answers for a model that the user named.

    Raises UsageError with every engine's reason if none can. Raises UsageError for a missing model, too, unless the
    order is the dummy alone.
    """
    order = config.engine.order
    if not is_dummy_chosen(config):
        from hildanext.model.pretrained import locate  # imports transformers, which the dummy does not need

        # Before any engine: a mistyped folder is no reason why an engine cannot serve.
        locate(config.model.base)
        order = [name for name in order if name != "dummy"]
        if stand_in and config.model.base == SHIPPED_MODEL and "dummy" in config.engine.order:
            order.append("dummy")
    reasons: dict[str, str] = {}
    for name in order:
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


def say_passed_over(engine: Engine) -> None:
    """Print a line for each engine that `open_engine` passed over before this one, with the reason."""
    for name, reason in engine.reasons.items():
        say(f"engine {name} passed over: {reason}")


def n_threads() -> int:
    """The number of torch threads in the calling thread."""
    import torch

    return torch.get_num_threads()


def open_base(config: Config, threads: int) -> Engine:
    """Load the AR base of the converted checkpoint `model.base`. It computes with `threads` torch threads.

    The thread count is set for the calling thread only. Raises UsageError if `model.base` is no converted checkpoint or
    its base is missing, ModelError if the base cannot be loaded.
    """
    from hildanext.decoding.engines.ar import ArEngine

    reason = ArEngine.can_serve(config)
    if reason is not None:
        raise UsageError(reason)
    return ArEngine(config, {}, threads)


def warn_block_size(engine: Engine, block_size: int | None) -> None:
    """Warn if `decode.block_size` differs from the block size that the checkpoint was trained with."""
    if block_size is not None and engine.trained_block is not None and block_size != engine.trained_block:
        effect = "fewer tokens per forward" if block_size < engine.trained_block else "worse text"
        say(
            f"decode.block_size is {block_size}, the checkpoint was trained with {engine.trained_block}: expect {effect}"
        )


def _engine(name: EngineName) -> Any:
    # Imported on demand: one engine must not load the libraries of another.
    if name == "dinfer":
        from hildanext.decoding.engines.dinfer import DInferEngine

        return DInferEngine
    if name == "transformers":
        from hildanext.decoding.engines.transformers import TransformersEngine

        return TransformersEngine
    from hildanext.decoding.engines.dummy import DummyEngine

    return DummyEngine
