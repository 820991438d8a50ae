"""A step that is out of memory is done again in smaller micro-batches: the same effective batch, the same numbers."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hildanext import cli
from hildanext.config import Config
from hildanext.model.diffusion_lm import Batch
from hildanext.training.checkpoint import list_checkpoints
from hildanext.training.convert import convert_wsd
from hildanext.training.denoising import DenoisingModule
from hildanext.training.memory import MemoryShortError
from hildanext.training.run_folder import MAY_CHANGE_ON_RESUME
from support.resume import outcome
from support.training import material

# What torch says on a GPU and on a CPU.
LINES = {
    "cuda": "CUDA out of memory. Tried to allocate 1.16 GiB.",
    "cpu": "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
}


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`room_for(rows, where)`: a larger micro-batch does not fit; it fails in its forward pass, from step `since` on."""

    def limit(rows: int, kind: str = "cuda", since: int = 0) -> None:
        forward, calls = DenoisingModule.forward, []

        def narrow(self: DenoisingModule, batch: Batch, *rest: Any) -> Any:
            if self.training or self.lm.model.training:
                calls.append(batch.samples)
                if len(batch.samples) > rows and min(batch.samples) >= 4 * since:
                    raise (torch.OutOfMemoryError if kind == "cuda" else RuntimeError)(LINES[kind])
            return forward(self, batch, *rest)

        monkeypatch.setattr(DenoisingModule, "forward", narrow)

    return limit


def config_for(folder: Path, base: Path, micro_batch: int) -> Config:
    noise = {"turns": 2, "embed_std": 0.3, "embed_steps": 4}
    return material(folder, base, noise=noise, train={"micro_batch": micro_batch, "eval_rows": 1, "eval_every": 0})


@pytest.mark.parametrize(("rows", "kind"), [(1, "cuda"), (2, "cpu")])
def test_the_numbers_are_those_of_the_smaller_micro_batch(
    tmp_path: Path, tiny_base: Path, room_for: Any, rows: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_wsd(config_for(tmp_path, tiny_base, rows), "small")
    room_for(rows, kind)
    capsys.readouterr()
    done = convert_wsd(config_for(tmp_path, tiny_base, 4), "short")
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    sizes = [4, 2, 1][: 2 if rows == 2 else 3]
    assert said == [
        f"step 1: out of memory; train.micro_batch {old} -> {new}, {4 // new} forwards a step, the same 4 rows"
        for old, new in itertools.pairwise(sizes)
    ]
    assert done["finished"]
    found, expected = (outcome(tmp_path / "runs" / name) for name in ("short", "small"))
    assert found.metrics == expected.metrics
    assert all(torch.equal(value, expected.tensors[name]) for name, value in found.tensors.items())


def test_a_step_that_began_is_begun_again(tmp_path: Path, tiny_base: Path, room_for: Any) -> None:
    """Short at step 4 only, its first micro-batch's gradients already there or not: nothing is counted twice."""
    convert_wsd(config_for(tmp_path, tiny_base, 2), "undisturbed")
    room_for(1, since=3)
    convert_wsd(config_for(tmp_path, tiny_base, 2), "short")
    found, expected = (outcome(tmp_path / "runs" / name) for name in ("short", "undisturbed"))
    assert found.metrics[:3] == expected.metrics[:3]
    for row, other in zip(found.metrics[3:], expected.metrics[3:], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["tokens_seen"] == other["tokens_seen"]


def test_a_single_row_that_does_not_fit_says_what_helps(
    tmp_path: Path, tiny_base: Path, room_for: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, tiny_base, 2)
    room_for(0, since=2)
    with pytest.raises(MemoryShortError, match=r"step 3: out of memory \(CUDA out of memory\. Tried"):
        convert_wsd(config)
    checkpoints = tmp_path / "runs" / "convert" / "checkpoints"
    assert [step for step, _ in list_checkpoints(checkpoints)] == [2]
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    capsys.readouterr()
    assert cli.main(["convert-wsd", "--config", str(file), "--resume"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith(
        "set train.gradient_checkpointing, and continue with --resume; or start a new run with train.optimizer 'adafactor' or "
        "a lower data.seq_len (24) ('hildanext preflight' shows what each saves)"
    )


def test_out_of_memory_in_the_optimizer_ends_the_run(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the weights have moved by then, and smaller micro-batches would not help: nothing is tried again."""
    calls: list[int] = []

    def short(self: torch.optim.AdamW, closure: Any = None) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError(LINES["cuda"])

    monkeypatch.setattr(torch.optim.AdamW, "step", short)
    named = r"step 1: out of memory in the optimizer .*; start a new run with train\.optimizer 'adafactor' or a lora\.rank \("
    with pytest.raises(MemoryShortError, match=named):
        convert_wsd(config_for(tmp_path, tiny_base, 4))
    assert len(calls) == 1


def test_what_helps_may_be_done_as_it_says(tmp_path: Path, tiny_base: Path) -> None:
    """Keys that are to be changed with --resume may be; the others may not."""
    config = config_for(tmp_path, tiny_base, 4)
    line = str(MemoryShortError(config, 4, 1, "full", processes=2))
    resumed, anew = line.split("continue with --resume")
    keys = re.compile(r"(train|data|lora)\.(\w+)")
    assert set(keys.findall(resumed)) == {
        ("train", "micro_batch"),
        ("train", "gradient_checkpointing"),
        ("train", "sharding"),
    }
    assert set(keys.findall(resumed)) <= MAY_CHANGE_ON_RESUME
    assert set(keys.findall(anew)) == {("train", "optimizer"), ("data", "seq_len")}
    assert not set(keys.findall(anew)) & MAY_CHANGE_ON_RESUME


def test_what_makes_room_may_change_on_resume(tmp_path: Path, tiny_base: Path, room_for: Any) -> None:
    """The run that was short goes on with half the micro-batch and checkpointing, and ends with the same numbers."""
    small = config_for(tmp_path, tiny_base, 1)
    convert_wsd(small, "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hildanext.training.trainer.Trainer.agreed", lambda self, stopped: True)  # ends after a step
        convert_wsd(config_for(tmp_path, tiny_base, 4))
    train = small.train.model_copy(update={"gradient_checkpointing": True})
    convert_wsd(small.model_copy(update={"train": train}), resume=True)
    for row, other in zip(*(outcome(tmp_path / "runs" / name).metrics for name in ("convert", "small")), strict=True):
        for key in ("loss", "m2t_ce", "tokens_seen"):
            assert row[key] == pytest.approx(other[key], rel=1e-4), row["step"]


STARTED_BY_A_LARGE_PROCESS = """
import subprocess, sys
large = bytearray(b"x") * 1_500_000_000
child = "import torch; from hildanext.training.memory import peak_memory_mb; print(peak_memory_mb(torch.device('cpu')))"
sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
"""


@pytest.mark.slow
def test_the_peak_is_that_of_the_process_not_of_who_started_it():
    done = subprocess.run(
        [sys.executable, "-c", STARTED_BY_A_LARGE_PROCESS], capture_output=True, text=True, check=True
    )
    assert 50 < float(done.stdout) < 1400
