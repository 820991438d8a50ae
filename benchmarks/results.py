"""Stores benchmark results across runs and machines; each part records the machine and date of its measurement."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch

from hildanext.files import write_json
from hildanext.provenance import versions


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def has_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions; without them bf16 is slower than fp32 in torch."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def machine() -> dict[str, Any]:
    """Hardware, versions, threads and load, for the record of a measurement."""
    found = [torch.backends.cpu.get_cpu_capability()]
    found += ["AVX512-BF16"] if torch.cpu._is_avx512_bf16_supported() else []
    found += ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    return {
        "cpu": cpu_name(),
        "capability": ", ".join(found),
        "bf16": has_bf16(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


def load(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def keep(file: Path, part: str, found: dict[str, Any] | None, where: dict[str, Any]) -> dict[str, Any]:
    """Store `found` as the result of `part`, measured on the machine `where`; returns the results of all parts.

    found None: the part cannot be measured on this machine, and its earlier result is kept.
    """
    results = load(file)
    if found is not None:
        results[part] = found | {"machine": where}
        write_json(file, results)
    return results


def stored_runs(page: Path) -> list[dict[str, Any]]:
    """The runs of a benchmark that keeps a list of them in the JSON file beside its page."""
    file = page.with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def machines_line(runs: list[dict[str, Any]]) -> str:
    """The processors on which runs were measured."""
    names = sorted({f"{run['machine']['cpu']} ({run['machine']['capability']})" for run in runs})
    return f"Machines: {'; '.join(names)}."


def spread(values: list[float], digits: int) -> str:
    """The mean of a value over runs, with its range if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
