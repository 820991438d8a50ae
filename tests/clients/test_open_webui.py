"""Open WebUI's calls, as it sends them to a server of OpenAI's API. The bodies are written by hand: it is no library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from support.clients import CHAT

HEADERS = {"Authorization": "Bearer none", "X-OpenWebUI-User-Id": "7", "X-OpenWebUI-Chat-Id": "c-1"}
# What its settings for a model and its switches add; unset ones are null.
EXTRA: dict[str, Any] = {
    "temperature": 0,
    "top_p": 1.0,
    "top_k": None,
    "min_p": None,
    "seed": None,
    "stop": [],
    "logit_bias": None,
    "frequency_penalty": None,
    "presence_penalty": None,
    "reasoning_effort": None,
    "response_format": None,
    "tools": [],
    "metadata": {"user_id": "7", "chat_id": "c-1", "features": {"web_search": False}},
    "files": None,
    "tool_ids": [],
    "filter_ids": [],
    "features": {},
    "variables": {},
    "background_tasks": {},
    "user": {"id": "7", "name": "Mia", "email": "mia@example.org", "role": "user"},
}


@pytest.fixture
def client(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"{url}/", headers=HEADERS) as found:
        yield found


def test_models(client: httpx2.Client) -> None:
    answer = client.get("models").json()
    assert [(model["id"], model["object"]) for model in answer["data"]] == [("model", "model")]


def test_stream(client: httpx2.Client, truth) -> None:
    body = {"model": "model", "messages": CHAT, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("chat/completions", json=body | EXTRA | {"max_tokens": 9})
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == truth(CHAT, max_new_tokens=9).text
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_chat(client: httpx2.Client, truth) -> None:
    """The title of a conversation, which it asks for without a stream."""
    title = [{"role": "user", "content": "### Task: a title.\nUSER: Hello"}]
    body = {"model": "model", "messages": title, "stream": False, "max_completion_tokens": 6}
    answer = client.post("chat/completions", json=body | {"metadata": {"task": "title_generation"}}).json()
    assert answer["choices"][0]["message"]["content"] == truth(title, max_new_tokens=6).text


def test_a_text_too_long(client: httpx2.Client) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "a dog " * 100}], "stream": True}
    answer = client.post("chat/completions", json=body | EXTRA)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
