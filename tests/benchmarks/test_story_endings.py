"""benchmarks/story_endings.py: questions from stories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "story_endings.py"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True)


def test_the_right_choice_makes_the_story_whole_and_no_other_does(tmp_path: Path) -> None:
    texts = [f"Mia has {n} cats. She feeds them. They eat. They sleep for {n} hours." for n in range(60)]
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "Too short. To ask."]))
    done = run(str(file))
    asked = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(asked) == len(texts)
    for text, one in zip(texts, asked, strict=True):
        whole = [f"{one['question']} {choice}" for choice in one["choices"]]
        assert len(set(whole)) == 4
        assert [answer == text for answer in whole] == [number == one["answer"] for number in range(4)]
    assert {one["answer"] for one in asked} == {0, 1, 2, 3}
    assert run(str(file)).stdout == done.stdout
    assert run(str(file), "--seed", "1").stdout != done.stdout
    assert run(str(file), "--choices", "61").returncode != 0
