"""deploy/ray_train.py with two workers, on a cluster that it starts and ends: the losses of one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hildanext import cli
from support.training import material

ROOT = Path(__file__).parents[2]
# A small cluster, with room for two workers on any machine; the script finds it by itself.
START = """
import runpy, sys
import ray
ray.init(num_cpus=3, include_dashboard=False, object_store_memory=80_000_000, _temp_dir=sys.argv[1], log_to_driver=True)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# One thread a worker; a machine under load is given time to start.
QUIET = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}


@pytest.mark.slow
def test_two_workers_train_as_one_process_does(tmp_path: Path, tiny_base: Path) -> None:
    for package in ("ray", "pandas"):
        pytest.importorskip(
            package, reason=f"{package} is not installed; it comes with the extra 'ray'", exc_type=ImportError
        )
    config = material(tmp_path, tiny_base)
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    command = ["convert-wsd", "--config", str(file), "--run"]
    assert cli.main([*command, "one"]) == 0
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:  # sockets lie in it
        script = [str(ROOT / "deploy" / "ray_train.py"), "--workers", "2", "--cpu", "--", *command, "two"]
        done = subprocess.run(
            [sys.executable, "-c", START, short, *script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            env=os.environ | QUIET,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def losses(run: str) -> list[float]:
        lines = (tmp_path / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    assert (tmp_path / "runs" / "two" / "checkpoints" / "step-6" / "model.safetensors").is_file()


def test_the_extra_brings_what_ray_train_imports() -> None:
    """ray's own extra `train` names pandas: it is imported before anything is trained."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^ray = (.*)$", text, re.M)
    assert extra is not None
    assert "pandas" in extra.group(1)
    assert "pandas==" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
