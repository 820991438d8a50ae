"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems whose answer is a number."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from hildanext.config import Config
from hildanext.errors import DataError, UsageError
from hildanext.evaluate.intervals import share
from hildanext.evaluate.records import read_records
from hildanext.evaluate.ways import Models, Outcome, Question, Way, complete, cost
from hildanext.model.prompts import encode_prompt

NAME = "gsm8k"
FIELDS = ("question", "answer")
# As in lm-eval's task: strict takes the first number after '####', flexible the last number in the text.
STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
Prompt = str | list[dict[str, str]]


def number(text: str) -> Decimal | None:
    """Parse '1,000' as 1000, '$18.' as 18, '18.00' as equal to 18; None if the text is not a number."""
    try:
        return Decimal(text.replace(",", "").replace("$", "").removesuffix("."))
    except InvalidOperation:
        return None


def strict(answer: str) -> Decimal | None:
    """The first number after '####'."""
    found = STRICT.search(answer)
    return number(found[1]) if found else None


def flexible(answer: str) -> Decimal | None:
    """The last number in the text."""
    found = FLEXIBLE.findall(answer)
    return number(found[-1]) if found else None


class Problems:
    """GSM8K questions, their right answers and the solved examples to put before each question."""

    def __init__(self, config: Config) -> None:
        """Raises UsageError without a file, DataError (file and line) if the file is not in GSM8K's format."""
        options = config.evaluate
        if NAME not in options.data:
            raise UsageError("the task 'gsm8k' needs its questions: give --data gsm8k=FILE.jsonl")
        path = Path(options.data[NAME])
        records = read_records(path, FIELDS, options.limit)
        self.questions = [record["question"] for record in records]
        self.right = []
        for index, record in enumerate(records, start=1):
            value = strict(record["answer"])
            if value is None:
                raise DataError(f"{path}: the answer of record {index} has no number after '####'")
            self.right.append(value)
        self.chat, self.shots = options.chat, list[dict[str, Any]]()
        if options.shots:
            if "gsm8k_shots" not in options.data:
                raise UsageError("'evaluate.shots' needs solved examples: give --data gsm8k_shots=FILE.jsonl")
            self.shots = read_records(Path(options.data["gsm8k_shots"]), FIELDS, options.shots)

    def prompt(self, question: str) -> Prompt:
        """Chat messages with the solved examples first; plain text in lm-eval's format if `evaluate.chat` is false."""
        if not self.chat:
            shots = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in self.shots)
            return f"{shots}Question: {question}\nAnswer:"
        messages = [
            message
            for shot in self.shots
            for message in (
                {"role": "user", "content": shot["question"]},
                {"role": "assistant", "content": shot["answer"]},
            )
        ]
        return [*messages, {"role": "user", "content": question}]


def evaluate(config: Config, models: Models, problems: Problems, way: Way) -> Outcome:
    """Ask every question once, greedily. Shares of exact matches (strict and flexible), and of answers that ended."""
    options = config.evaluate
    stop = () if problems.chat else ("Question:",)
    questions = [
        Question(encode_prompt(models.lm.tokenizer, problems.prompt(question)), options.answer_tokens, stop)
        for question in problems.questions
    ]
    answers = complete(models, way, questions, NAME)
    exact = [strict(answer.text) == right for answer, right in zip(answers, problems.right, strict=True)]
    loose = [flexible(answer.text) == right for answer, right in zip(answers, problems.right, strict=True)]
    rows = zip(problems.questions, answers, problems.right, exact, loose, strict=True)
    samples = [
        {"question": question, "answer": answer.text, "right": str(right), "strict": a, "flexible": b}
        for question, answer, right, a, b in rows
    ]
    figures = {
        "exact_match_flexible": share(loose),
        "exact_match_strict": share(exact),
        "ended": share([answer.ended for answer in answers]),
    }
    return Outcome(way.name, figures | cost(answers, options.resamples, options.seed), samples)
