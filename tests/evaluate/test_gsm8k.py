"""GSM8K: prompts, and the number in an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hildanext.config import Config
from hildanext.errors import DataError, UsageError
from hildanext.evaluate import command, gsm8k
from hildanext.evaluate.ways import Models
from support.evaluate import changed


def test_the_number_in_an_answer(subtests: pytest.Subtests) -> None:
    for text, exact, loose in [
        ("2+2=4\n#### 4", "4", "4"),
        ("so it is $1,000.", None, "1000"),
        ("#### 1,234 apples, not 5", "1234", "5"),
        ("#### -3", "-3", "-3"),
        ("#### 18.00", "18", "18"),
        ("The answer is 7.", None, "7"),
        ("no number", None, None),
        ("", None, None),
        ("#### .", None, None),
    ]:
        with subtests.test(text=text, exact=exact, loose=loose):
            assert gsm8k.strict(text) == (None if exact is None else gsm8k.number(exact))
            assert gsm8k.flexible(text) == (None if loose is None else gsm8k.number(loose))


def test_every_answer_of_gsm8k_is_right_to_itself(shared: Callable[[str], Path], small: Config) -> None:
    path = shared("gsm8k/test.jsonl")
    problems = gsm8k.Problems(changed(small, evaluate={"data": {"gsm8k": str(path)}, "limit": None}))
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(problems.right) == len(records) == 1319
    for record, right in zip(records, problems.right, strict=True):
        assert gsm8k.strict(record["answer"]) == gsm8k.flexible(record["answer"]) == right
        assert float(record["answer"].split("####")[1].replace(",", "")) == float(right)


def test_prompts_of_gsm8k(small: Config, tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text(
        '{"question": "1+1?", "answer": "2 #### 2"}\n{"question": "never", "answer": "#### 0"}\n', encoding="utf-8"
    )
    data = small.evaluate.data | {"gsm8k_shots": str(shots)}
    chat = gsm8k.Problems(changed(small, evaluate={"shots": 1, "data": data}))
    assert chat.prompt("2+2?") == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2 #### 2"},
        {"role": "user", "content": "2+2?"},
    ]
    plain = gsm8k.Problems(changed(small, evaluate={"shots": 1, "chat": False, "data": data}))
    assert plain.prompt("2+2?") == "Question: 1+1?\nAnswer: 2 #### 2\n\nQuestion: 2+2?\nAnswer:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "1?"}\n', ":1: no text 'answer'"),
        ('{"question": "1?", "answer": "#### 1"}\n{broken\n', ":2: not valid JSON"),
        ("\n", "no records"),
        ('{"question": "1?", "answer": "one"}\n', "record 1 has no number"),
        ("[]\n", ":1: no text 'question'"),
    ],
)
def test_a_broken_file_is_named_with_its_line(small: Config, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        gsm8k.Problems(changed(small, evaluate={"data": {"gsm8k": str(path)}}))


def test_a_model_without_a_chat_template_is_told_so(
    small: Config, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.lm.tokenizer, "chat_template", None)
    problems = gsm8k.Problems(small)
    with pytest.raises(UsageError, match=r"has no chat template; set evaluate\.chat=false"):
        command.runs(small, models, "gsm8k", problems)
    plain = changed(small, evaluate={"chat": False})
    assert len(command.runs(plain, models, "gsm8k", gsm8k.Problems(plain))["gsm8k"]) == 5
