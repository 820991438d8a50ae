"""benchmarks/train.py: numbers survive other parts' failures and other machines, bars are judged, kills strike every phase."""

from __future__ import annotations

import argparse
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def kills_found(identical: bool, n: int = 20) -> dict[str, Any]:
    struck = [{"command": "sft", "after": 1.0, "phase": "working", "left": "3 steps logged"}] * n
    return {"kills": n, "struck": struck, "seconds": {"sft": 2.0}, "identical": identical}


def arguments(tmp_path: Path, only: str | None) -> argparse.Namespace:
    return argparse.Namespace(only=only, side=None, results=tmp_path / "train.json", page=tmp_path / "train.md")


def test_a_part_is_written_when_it_ends_and_a_skipped_one_leaves_what_was_measured(bench, tmp_path, monkeypatch):
    train = bench("train")
    monkeypatch.setitem(train.PARTS, "kills", lambda args, folder: kills_found(True))
    assert train.one_part(arguments(tmp_path, "kills")) == 0
    kept = json.loads((tmp_path / "train.json").read_text())
    assert kept["kills"]["machine"]["cores"] >= 1
    assert {"capability", "versions", "date", "gpu"} <= set(kept["kills"]["machine"])
    page = (tmp_path / "train.md").read_text()
    assert "| 20 kills, identical weights | 20 kills, identical | met |" in page
    assert page.count("| not measured |") == 10
    assert 'Not measured yet: `make bench-train ARGS="--only gpu"`' in page
    # As on a machine without a GPU.
    kept["gpu"] = {"device": "H100", "tokens_per_second": 1.0, "mfu": 0.3, "flex_over_dense": 2.5, "budget": {}}
    one = {"fits": True, "peak": 7e9, "dtype": "torch.float16", "as_on": "sm_61", "attention": "pieces"}
    kept["gpu"] |= {"budget": dict.fromkeys(("qwen3-0.6b-gtx1080", "qwen3-1.7b-lora-8gb"), one)}
    kept["gpu"]["machine"] = kept["kills"]["machine"]
    (tmp_path / "train.json").write_text(json.dumps(kept))
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: False)
    assert train.one_part(arguments(tmp_path, "gpu")) == 0
    assert json.loads((tmp_path / "train.json").read_text()) == kept
    page = (tmp_path / "train.md").read_text()
    assert "| 40 % | 30% (H100) | **NOT met** |" in page
    assert "| 2 times | 2.50 times | met |" in page


def test_weights_that_are_not_identical_fail_and_are_on_the_page(bench, tmp_path, monkeypatch):
    train = bench("train")
    monkeypatch.setitem(train.PARTS, "kills", lambda args, folder: kills_found(False))
    assert train.one_part(arguments(tmp_path, "kills")) == 1
    assert "| 20 kills, NOT identical | **NOT met** |" in (tmp_path / "train.md").read_text()


def test_a_part_that_fails_is_named_and_the_others_go_on(bench, monkeypatch, capsys):
    train, ran = bench("train"), []

    def one(command: list[str]) -> Any:
        ran.append(command[-1])
        return subprocess.CompletedProcess(command, int(command[-1] in ("speed", "kills")))

    monkeypatch.setattr(train.subprocess, "run", one)
    assert train.every_part() == 1
    assert ran == ["budget", "kills", "scaling", "speed", "gated", "memory", "gpu"]
    assert capsys.readouterr().err == "failed: kills, speed\n"


@pytest.mark.parametrize("plain", [{"peak": 20_000_000_000}, {"peak": None, "more_than": 20_000_000_000}])
def test_memory_and_speed_are_judged_against_their_bars(bench, plain):
    page = bench("train_page")
    ours = {"peak": 11_000_000_000, "predicted": 12_000_000_000}
    small = {"peak": 9_000_000_000, "predicted": 7_000_000_000}
    sides = {"plain": plain | {"predicted": None}, "ours": ours, "ours, checkpointing": small}
    sides["ours, checkpointing and 8-bit AdamW"] = {"peak": None, "more_than": 1, "predicted": None}
    machine = {"bf16": False}
    kinds = {"packed": {"ratio": 2.0}, "one document": {"ratio": 1.7}}
    speed = {"dtype": "float32", "row": 1024, "kinds": kinds, "machine": machine}
    found = page.bars({"memory": {"sides": sides}, "speed": speed})
    verdicts = [one.met for one in found]
    assert verdicts[:6] == [True, False, False, True, False, False]  # speed, memory of three sides, preflight
    assert found[0].measured == "2.00 times (fp32, this CPU has no bf16 instructions)"
    assert found[2].measured == f"{'' if plain['peak'] else 'at most '}0.55 of it (11.00 GB)"
    assert found[5].measured == "off by 22% at most"
    assert set(verdicts[6:]) == {None}


@pytest.mark.slow
def test_a_side_without_memory_leaves_a_lower_bound_and_no_other_failure_hides(bench, monkeypatch):
    memory = bench("train_memory")
    setup = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import train_memory, torch; "
    # Of 700 MB that are said to be free all but 500 are refused: 300 MB on top of what the process has.
    setup += "from types import SimpleNamespace as N; train_memory.psutil.virtual_memory = lambda: N(available=700_000_000); "
    refused = memory.measured([sys.executable, "-c", setup + "train_memory.die_first(); torch.ones(300_000_000)"])
    assert refused["peak"] is None
    assert refused["more_than"] > 1e8
    killed = memory.measured([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed["peak"] is None
    assert memory.measured([sys.executable, "-c", "print('{\"peak\": 1}')"]) == {"peak": 1}
    with pytest.raises(RuntimeError, match="no such thing"):
        memory.measured([sys.executable, "-c", "raise ValueError('no such thing')"])


WORKER = """
import os, pathlib, time
time.sleep(0.3)  # starting
folder = pathlib.Path("runs/convert")
folder.mkdir(parents=True, exist_ok=True)
for step in range(6):
    time.sleep(0.05)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("x\\n")
    half, whole = folder / f".tmp-step-{step}", folder / f"step-{step}"
    half.write_text("half")
    time.sleep(0.05)  # saving
    os.replace(half, whole)
"""


@pytest.mark.slow
def test_kills_strike_while_it_starts_works_and_saves(bench, tmp_path, monkeypatch):
    kills = bench("kills")
    monkeypatch.setattr(kills, "arguments", lambda command, resume: [sys.executable, "-S", "-c", WORKER])
    usual = kills.run(tmp_path, "convert-wsd")
    assert not usual.killed
    assert 0.25 < usual.began < usual.seconds
    struck = kills.strike(tmp_path, "convert-wsd", 6, usual, random.Random(1))
    assert len(struck) == 6
    assert {one["phase"] for one in struck} == {"starting", "working", "saving"}
    assert (
        sorted(path.name for path in (tmp_path / "runs/convert").iterdir() if path.name.startswith("step"))[-1]
        == "step-5"
    )
    monkeypatch.setattr(
        kills, "arguments", lambda command, resume: [sys.executable, "-S", "-c", "raise SystemExit('why')"]
    )
    with pytest.raises(RuntimeError, match="convert-wsd: why"):
        kills.run(tmp_path, "convert-wsd")
