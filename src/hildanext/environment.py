"""Variables and modules that libraries look up when they are imported: they print little and report nothing home.

`prepare` must run before the libraries are imported. A variable that the user has set is left as it is.
"""

from __future__ import annotations

import os
import sys
from typing import Any, cast

# The libraries' own progress bars and warnings would mix with ours on stderr.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
}
UNREPORTED = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets and evaluate, which lm-eval loads
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers asks a service to convert weights of other formats
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",  # dInfer loads vLLM
    # What tools of train.trackers report beside the runs that they are given
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio loads gradio
    "DVC_NO_ANALYTICS": "1",
}


def prepare() -> None:
    """Set all variables, for a process that is a command of HildaNext."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    without_reports()
    # torch's threads wait for each other by spinning, which wastes cores on a busy machine. libgomp reads this at load.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def without_reports() -> None:
    """Turn the libraries' reports off, and change nothing else. Enough where HildaNext is a library itself."""
    for name, value in UNREPORTED.items():
        os.environ.setdefault(name, value)
    without_openvino_telemetry()


def without_openvino_telemetry() -> None:
    """Hide the package that posts each conversion to an analytics host and writes a client id into the user's home.

    Without it OpenVINO uses a stub. The package's own way to opt out writes into the user's home, too.
    """
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
