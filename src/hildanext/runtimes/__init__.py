"""Runtimes: what runs the forwards of the transformers engine."""

from __future__ import annotations

from hildanext.config import EngineConfig
from hildanext.model import DiffusionLM
from hildanext.runtimes.protocol import Runtime


def open_runtime(config: EngineConfig, lm: DiffusionLM) -> Runtime:
    from hildanext.runtimes.eager import EagerRuntime

    return EagerRuntime(lm.model)
