"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): a question, an answer, the number in it."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.errors import DataError, UsageError
from hildanext.evaluate.intervals import share
from hildanext.evaluate.records import read_records
from hildanext.evaluate.ways import Models, Outcome, Question, Way, answer, cost
from hildanext.model.prompts import encode_prompt

NAME = "gsm8k"
FIELDS = ("question", "answer")
# As lm-eval's task reads an answer: the first number behind '####', or the last number anywhere.
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
Prompt = str | list[dict[str, str]]


def number(text: str) -> Decimal | None:
    """'1,000' -> 1000, '$18.' -> 18, '18.00' equals 18; None for what is no number."""
    try:
        return Decimal(text.replace(",", "").replace("$", "").removesuffix("."))
    except InvalidOperation:
        return None


def strict(answer: str) -> Decimal | None:
    found = STRICT.search(answer)
    return number(found[1]) if found else None


def flexible(answer: str) -> Decimal | None:
    found = FLEXIBLE.findall(answer)
    return number(found[-1]) if found else None


class Problems:
    """Questions as prompts, and their answers."""

    def __init__(self, config: Config) -> None:
        """Raises UsageError when no file is given, DataError (file and line) for one that is not GSM8K."""
        how = config.evaluate
        if NAME not in how.data:
            raise UsageError("the task 'gsm8k' needs its questions: give --data gsm8k=FILE.jsonl")
        path = Path(how.data[NAME])
        records = read_records(path, FIELDS, how.limit)
        self.questions = [record["question"] for record in records]
        self.right = []
        for place, record in enumerate(records, start=1):
            value = strict(record["answer"])
            if value is None:
                raise DataError(f"{path}: the answer of record {place} has no number behind '####'")
            self.right.append(value)
        self.chat, self.shots = how.chat, list[dict[str, Any]]()
        if how.shots:
            if "gsm8k_shots" not in how.data:
                raise UsageError("'evaluate.shots' needs solved examples: give --data gsm8k_shots=FILE.jsonl")
            self.shots = read_records(Path(how.data["gsm8k_shots"]), FIELDS, how.shots)

    def prompt(self, question: str) -> Prompt:
        """Messages, the shots as turns before; or plain text as lm-eval writes it."""
        if not self.chat:
            shots = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in self.shots)
            return f"{shots}Question: {question}\nAnswer:"
        turns = [
            turn
            for one in self.shots
            for turn in (
                {"role": "user", "content": one["question"]},
                {"role": "assistant", "content": one["answer"]},
            )
        ]
        return [*turns, {"role": "user", "content": question}]


def evaluate(config: Config, models: Models, problems: Problems, way: Way) -> Outcome:
    how = config.evaluate
    stop = () if problems.chat else ("Question:",)
    questions = [
        Question(encode_prompt(models.lm.tokenizer, problems.prompt(question)), how.answer_tokens, stop)
        for question in problems.questions
    ]
    answers = answer(models, way, questions, NAME)
    exact = [strict(one.text) == right for one, right in zip(answers, problems.right, strict=True)]
    loose = [flexible(one.text) == right for one, right in zip(answers, problems.right, strict=True)]
    samples = [
        {"question": question, "answer": one.text, "right": str(right), "strict": a, "flexible": b}
        for question, one, right, a, b in zip(problems.questions, answers, problems.right, exact, loose, strict=True)
    ]
    figures = {
        "exact_match_flexible": share(loose),
        "exact_match_strict": share(exact),
        "ended": share([one.ended for one in answers]),
    }
    return Outcome(way.name, figures | cost(answers, how.resamples, how.seed), samples)
