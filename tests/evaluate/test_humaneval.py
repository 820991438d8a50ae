"""HumanEval: from the prompt to the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hildanext.config import Config
from hildanext.errors import UsageError
from hildanext.evaluate import command, humaneval
from hildanext.evaluate.records import read_records
from hildanext.evaluate.sandbox import Limits, Verdict
from hildanext.evaluate.ways import Models, ways
from support.evaluate import PROBLEMS, changed
from support.waiting import LAST_RESORT


def test_every_canonical_solution_of_humaneval_passes() -> None:
    """The published problems through the sandbox: what is right passes, and an empty body passes none of some."""
    try:
        path = humaneval.find(Config())
    except UsageError as error:
        pytest.skip(str(error))
    problems = read_records(path, humaneval.FIELDS, None)
    assert len(problems) == 164
    limits = Limits(cpu_s=20, wall_s=LAST_RESORT)
    right = humaneval.run_tests(problems, [one["canonical_solution"] for one in problems], limits)
    assert right == [Verdict(True, "passed")] * 164
    some = problems[::16]
    wrong = humaneval.run_tests(some, ["    pass\n"] * len(some), limits)
    assert not any(verdict.passed for verdict in wrong)


def test_pass_at_k_counts_each_problems_own_samples(small: Config) -> None:
    """Verdicts come sample by sample, problem by problem within."""
    config = changed(small, evaluate={"samples": 3, "k": [1, 2], "temperature": 1.0})
    right = [[True, False, False], [True, True, False], [False, False, False]]  # problem, sample
    verdicts = [Verdict(right[item][sample], "") for sample in range(3) for item in range(3)]
    figures = humaneval._figures(config, verdicts, 3)
    assert figures["pass@1"].value == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert figures["pass@2"].value == pytest.approx((2 / 3 + 1 + 0) / 3)  # of the 3 pairs: 2, 3, 0 hold a right one


def test_humaneval_runs_what_was_written_only_when_allowed(small: Config, tmp_path: Path) -> None:
    config = changed(
        small, evaluate={"data": {"humaneval": str(PROBLEMS)}, "limit": 2}, engine={"context": 256, "slots": 2}
    )
    with pytest.raises(UsageError, match="--allow-code-execution"):
        command.evaluate(config, ["humaneval"], [], None, tmp_path, allow_code=False)
    assert not list(tmp_path.iterdir())


def test_humaneval_from_the_prompt_to_the_verdict(
    small: Config, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model writes is replaced by right and wrong bodies: prompt and completion are joined, tested and counted."""
    problems = read_records(PROBLEMS, humaneval.FIELDS, 4)
    bodies = ["\n" + one["canonical_solution"] for one in problems[:3]] + ["\n    return None\n"]
    asked: list[str] = []
    monkeypatch.setattr(humaneval, "encode_prompt", lambda tokenizer, prompt: asked.append(prompt) or [5, 6, 7])
    real = humaneval.complete

    def written(*args: Any) -> Any:
        return [one._replace(text=body) for one, body in zip(real(*args), bodies, strict=True)]

    monkeypatch.setattr(humaneval, "complete", written)
    try:
        outcome = humaneval.evaluate(small, models, problems, ways(small, models)[1])
    except UsageError as error:
        pytest.skip(str(error))
    assert [one["passed"] for one in outcome.samples] == [True, True, True, False]
    assert outcome.figures["pass@1"].value == 0.75
    assert outcome.samples[0]["task_id"] == "HildaNext/0"
    assert asked == [one["prompt"].rstrip("\n") for one in problems]  # a line break alone is no token to go on from
