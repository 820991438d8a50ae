"""Recorded numbers stay equal, and files of earlier versions still load.

`golden/numbers.json` holds ten steps of each training and forty decoded texts; `golden/before` a run, an adapter and a job
table. Both were written by the flat package, before it was split into ten.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from golden.measure import decodes, machine, steps_of, trainings
from hildanext.config import load_config
from hildanext.jobs.store import Store
from hildanext.model.loading import load_diffusion_lm
from hildanext.training.convert import convert_wsd

RECORDED = json.loads((Path(__file__).parent / "golden" / "numbers.json").read_text())


def same(found: Any, recorded: Any) -> None:
    """Equal to the last digit on the kind of machine that recorded the numbers; other kernels round in another order."""
    if machine() == RECORDED["machine"]:
        assert found == recorded
    else:
        nearly_same(found, recorded)


def nearly_same(found: Any, recorded: Any) -> None:
    if isinstance(recorded, dict):
        assert found.keys() == recorded.keys()
        for key, value in recorded.items():
            nearly_same(found[key], value)
    elif isinstance(recorded, list):
        assert len(found) == len(recorded)
        for one, other in zip(found, recorded, strict=True):
            nearly_same(one, other)
    else:
        assert found == (pytest.approx(recorded, rel=1e-3) if isinstance(recorded, float) else recorded)


def test_ten_steps_of_every_training(tmp_path: Path):
    same(json.loads(json.dumps(trainings(tmp_path))), RECORDED["trainings"])


def test_forty_decoded_texts(tmp_path: Path):
    found = json.loads(json.dumps(decodes(tmp_path)))
    assert len(found) == 40
    same(found, RECORDED["decodes"])


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder written by the flat package: a run stopped at step 4 of 6, an adapter, a job table."""
    folder = tmp_path / "before"
    shutil.copytree(Path(__file__).parent / "golden" / "before", folder)
    monkeypatch.chdir(folder)
    return folder


def test_a_run_of_before_is_resumed(before: Path):
    result = convert_wsd(load_config("config.json"), "convert", resume=True)
    assert result["steps"] == 6
    recorded = json.loads((before / "metrics.json").read_text())  # all six steps of an undisturbed run
    nearly_same(steps_of(result), recorded)  # its step 4 was computed on another kind of machine


def test_an_adapter_of_before_loads(before: Path):
    lm, _ = load_diffusion_lm(load_config("config.json", ["model.base=adapter"]).model)
    assert (lm.block_size, lm.convention, lm.record["tokens_trained"]) == (4, "shifted", 512)


def test_a_job_of_before_is_listed(before: Path):
    store = Store("sqlite:///jobs.sqlite")
    (job,) = store.list()
    assert (job.id, job.kind, job.state, job.attempt) == ("20261101-120000-00000001", "convert-wsd", "queued", 1)
    assert job.request == {"config": {"train": {"lr": 0.001}}, "options": {"run": "old"}}
    store.close()
