"""benchmarks/shipped.py: the whole of it on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hildanext.config import Config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_one_file_holds_quality_speed_and_what_editing_gives(
    converted: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import shipped

    prompts, out = tmp_path / "prompts.txt", tmp_path / "shipped.json"
    prompts.write_text("Once upon a time\nMia had a\nLeo found\n", encoding="utf-8")
    keys = ["--set", "model.device=cpu", "--set", "model.dtype=float32", "--set", "engine.slots=2"]
    where = ["--model", converted.model.base, "--prompts", str(prompts), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["shipped.py", *where, "--tokens", "12", "--pairs", "2", "--sweep", *keys])
    shipped.main()
    printed = capsys.readouterr().out
    assert "editing: " in printed
    report = json.loads(out.read_text(encoding="utf-8"))
    assert list(report["rows"])[:3] == ["AR", "Q_MODE", "Q_MODE, editing off"]
    assert len(report["rows"]) == 5 + len(shipped.SWEEP)
    assert report["rows"]["AR"]["tokens_per_forward"] == 1
    for mode in ("Q_MODE", "S_MODE"):
        found = report["speed"][mode]
        assert found["pairs"] == 2
        assert found["median_ratio"] > 0
        assert f"{mode}: {found['median_ratio']:.2f} times the base's tokens per second" in printed
    assert "editing_gain_at_equal_tokens_per_forward" in report
