"""Runtimes run the forwards of the transformers engine. Read `protocol.py` first, then `eager.py`."""

from __future__ import annotations

import importlib.util

from hildanext.config import EngineConfig
from hildanext.decoding.runtimes.protocol import Runtime
from hildanext.environment import without_openvino_telemetry
from hildanext.errors import ConfigError
from hildanext.model.diffusion_lm import DiffusionLM
from hildanext.progress import say

__all__ = ["Runtime", "choose_runtime", "open_runtime"]

without_openvino_telemetry()  # also where no command has done so: this runs before `openvino.py` is imported


def choose_runtime(wanted: str, device: str, openvino: bool) -> tuple[str, str]:
    """(runtime, reason) for `engine.runtime` on this machine. Raises ConfigError if the wanted runtime cannot run."""
    if wanted == "auto":
        if device == "cuda":
            return "cudagraphs", "a block's forward is short, so launching its kernels costs more than running them"
        if device == "cpu" and openvino:
            return "openvino", "it is installed and faster than eager on CPUs"
        return (
            "eager",
            "OpenVINO is not installed (extra 'cpu')" if device == "cpu" else f"the only runtime for {device}",
        )
    if wanted == "openvino" and not openvino:
        raise ConfigError("'engine.runtime': openvino is not installed; pip install 'hildanext[cpu]', or use 'auto'")
    if wanted == "openvino" and device != "cpu":
        raise ConfigError(
            f"'engine.runtime': openvino runs on CPUs, the model is on {device}; use 'auto' or model.device"
        )
    if wanted == "cudagraphs" and device != "cuda":
        raise ConfigError(f"'engine.runtime': cudagraphs needs a CUDA GPU, the model is on {device}; use 'auto'")
    return wanted, "set in the configuration"


def has_openvino() -> bool:
    """Whether OpenVINO is installed (extra `cpu`). Does not import it."""
    return importlib.util.find_spec("openvino") is not None


def open_runtime(
    config: EngineConfig, lm: DiffusionLM, widths: tuple[int, ...], later: tuple[int, ...] = ()
) -> Runtime:
    """Open the runtime of `engine.runtime` around a loaded model, and say which one runs and why.

    widths: the numbers of rows that most passes of one sequence have, ascending; they get graphs of their own. later:
    those that passes of other settings have, which get theirs with the first request for them (`Runtime.prepare`).
    Raises ConfigError for settings that cannot run on this machine.
    """
    name, reason = choose_runtime(config.runtime, lm.device.type, has_openvino())
    if config.weights != "native" and name != "openvino":
        raise ConfigError(
            f"'engine.weights': the {name} runtime supports 'native' only; '{config.weights}' needs 'openvino' on a CPU"
        )
    say(f"runtime {name}: {reason}")
    if name == "openvino":
        from hildanext.decoding.runtimes.openvino import OpenVinoRuntime

        return OpenVinoRuntime(lm.model, widths, config.weights, later)
    if name == "compiled":
        from hildanext.decoding.runtimes.compiled import CompiledRuntime

        return CompiledRuntime(lm.model, widths, later)
    if name == "cudagraphs":
        from hildanext.decoding.runtimes.cudagraphs import CudaGraphRuntime

        return CudaGraphRuntime(lm.model, widths, later)
    from hildanext.decoding.runtimes.eager import EagerRuntime

    return EagerRuntime(lm.model)
