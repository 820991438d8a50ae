"""Fixtures: a small evaluation of a tiny converted model."""

from __future__ import annotations

import json

import pytest

from hildanext.config import Config
from hildanext.data.synthetic import synthetic_stories
from hildanext.evaluate import command
from hildanext.evaluate.ways import Models
from support.evaluate import changed


@pytest.fixture(scope="session")
def small(converted: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The tiny converted model, small budgets, and documents to continue."""
    folder = tmp_path_factory.mktemp("texts")
    documents = (json.dumps({"text": text}) + "\n" for text in synthetic_stories(12, seed=5))
    (folder / "stories.jsonl").write_text("".join(documents), encoding="utf-8")
    questions = [
        {"question": f"What is {a} plus 4?", "answer": f"{a}+4=<<{a}+4={a + 4}>>{a + 4}\n#### {a + 4}"}
        for a in range(5)
    ]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    data = {name: str(folder / "stories.jsonl") for name in ("stories", "infilling")} | {
        "gsm8k": str(folder / "gsm8k.jsonl")
    }
    budgets = {
        "prompt_tokens": 12,
        "story_tokens": 10,
        "infill_tokens": 16,
        "span": 4,
        "answer_tokens": 8,
        "code_tokens": 8,
    }
    return changed(
        converted, evaluate={"data": data, "limit": 3, "resamples": 100, **budgets}, engine={"slots": 2, "context": 64}
    )


@pytest.fixture(scope="session")
def models(small: Config) -> Models:
    return command.open_models(small, None)[0]
