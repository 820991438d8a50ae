"""benchmarks/serve.py: its books can tell a lost answer from a good one, and the whole of it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import serve

    return serve


def books(n: int = 3) -> tuple[list[dict[str, Any]], dict[str, int], Counter[str]]:
    """n clients answered once each, one of them refused before: rows, the server's counters, the server's log."""
    rows = [{"id": f"x-{i}-0", "status": 200, "answers": 1, "refused": 0, "tokens": 4} for i in range(n)]
    rows[0] |= {"id": "x-0-1", "refused": 1}
    return rows, {"200": n, "429": 1, "tokens": 4 * n}, Counter(row["id"] for row in rows)


def test_books_that_agree(serve: Any) -> None:
    found = serve.account(*books())
    assert found == {"answered": 3, "refused": 1, "errors": [], "tokens": 12, "exactly_once": True}


def test_books_that_do_not(serve: Any) -> None:
    for fault in ["doubled", "lost", "logged twice", "not logged", "uncounted", "tokens", "500"]:
        rows, counted, logged = books()
        if fault == "doubled":
            rows[1]["answers"] = 2
        elif fault == "lost":
            rows[1] = {"id": "x-1-0", "status": 200, "answers": 0, "refused": 0, "error": "the stream ended"}
        elif fault == "logged twice":
            logged["x-1-0"] += 1
        elif fault == "not logged":
            del logged["x-1-0"]
        elif fault == "uncounted":
            counted["200"] -= 1
        elif fault == "tokens":
            counted["tokens"] += 1
        else:
            counted["500"] = 1
        assert not serve.account(rows, counted, logged)["exactly_once"], fault


def test_percentiles_and_slope(serve: Any) -> None:
    assert serve.percentiles([float(i) for i in range(100, 0, -1)]) == {"p50": 51.0, "p95": 96.0, "p99": 100.0}
    assert serve.percentiles([2.0]) == {"p50": 2.0, "p95": 2.0, "p99": 2.0}
    assert serve.slope([(t, 5.0 + 0.25 * t) for t in range(10)]) == pytest.approx(0.25)


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    """Tiny numbers, more clients than slots and queue: 429 and all."""
    results, page = tmp_path / "results.json", tmp_path / "page" / "serve.md"
    sizes = [
        "--clients",
        "3",
        "128",
        "--requests",
        "4",
        "--each",
        "1",
        "--tokens",
        "16",
        "--rounds",
        "1",
        "--soak",
        "8",
        "--health",
        "2",
    ]
    command = [sys.executable, str(BENCHMARKS / "serve.py"), *sizes, "--results", str(results), "--page", str(page)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    parts = json.loads(results.read_text())["tiny"]
    rows = parts["levels"]["levels"]
    assert [(row["clients"], row["errors"], row["exactly_once"]) for row in rows] == [
        (n, [], True) for n in (1, 3, 128)
    ]
    assert [row["requests"] for row in rows] == [12, 4, 128]  # one client ran before and after each of the others
    assert [row["same_text"] for row in rows] == [1.0] * 3
    assert rows[2]["refused"] > 0
    for row in rows:
        for values in (row["first_s"], row["request_s"], row["with_retries_s"]):
            assert 0 < values["p50"] <= values["p95"] <= values["p99"]
    soak = parts["soak"]
    assert soak["exactly_once"]
    assert soak["errors"] == []
    assert len(soak["samples"]) >= 2
    assert [row["while"] for row in parts["health"]["health"]][:2] == ["idle", "128 clients"]
    assert all(row["requests"] and row["p50"] <= row["most_s"] for row in parts["health"]["health"])
    text = page.read_text()
    assert "| 128 |" in text
    assert (page.parent / "serve_soak_tiny.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_cost_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import serve_features

    results, page = tmp_path / "results.json", tmp_path / "page" / "features.md"
    sizes = ["--requests", "1", "--tokens", "8", "--rounds", "1", "--results", str(results), "--page", str(page)]
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "serve_features.py"), *sizes], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    rows = json.loads(results.read_text())["tiny"]["rows"]
    assert [row["feature"] for row in rows] == ["none", *serve_features.FEATURES]
    for row in rows:
        assert min(row["first_ms"], row["rate"], row["forward_ms"], row["ratio"]) > 0
        assert f"| {row['feature']} |" in page.read_text()
