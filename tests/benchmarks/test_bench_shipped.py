"""benchmarks/shipped.py: the whole of it on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from support.models import write_gated

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_one_file_holds_what_is_equal_to_the_base_and_how_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import shipped

    config = write_gated(tmp_path)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "shipped.json"
    prompts.write_text("Once upon a time\nMia had a\nLeo found\n", encoding="utf-8")
    keys = ["--set", "model.device=cpu", "--set", "engine.slots=2", "--set", "decode.max_new_tokens=12"]
    where = ["--model", config.model.base, "--prompts", str(prompts), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["shipped.py", *where, "--tokens", "12", "--only-eager", *keys])
    shipped.main()
    report = json.loads(out.read_text(encoding="utf-8"))
    assert list(report["ways"]) == [way.name for way in shipped.ways(3)]
    exact = report["ways"]["EXACT"]
    assert (exact["equal"], exact["answers"], exact["differences"]) == (3, 3, [])
    assert exact["log_likelihood"] == pytest.approx(report["base"]["log_likelihood"], abs=1e-6)
    assert exact["distinct_2"] == report["base"]["distinct_2"]
    assert report["ways"]["EXACT, a group behind every draft"]["settings"]["rows"] == 16


def test_the_first_difference_is_where_the_texts_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import shipped

    loaded = shipped.load_with_base(write_gated(tmp_path).model)
    found = shipped.first_difference(loaded, [5, 6], [7, 8, 9], [7, 10, 9])
    with torch.inference_mode():
        p = loaded.base(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    assert found == {"token": 1, "base": pytest.approx(float(p[8])), "other": pytest.approx(float(p[10]))}
    assert shipped.first_difference(loaded, [5, 6], [7, 8], [7, 8]) is None


def test_a_ratio_is_taken_on_the_same_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import shipped

    rates = {"slow": lambda prompt: prompt[0], "fast": lambda prompt: 3.0 * prompt[0]}
    found = shipped.speeds(rates, [[1], [10], [100]], ("slow",))
    assert found["fast"] == {"tokens_per_second": 30.0, "times slow": 3.0}
