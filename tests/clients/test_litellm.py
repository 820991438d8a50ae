"""`litellm`, with the provider `openai/` and an `api_base`."""

from __future__ import annotations

import asyncio
import gc
import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from support.clients import CHAT, CITIES, PROMPT, TOO_LONG, TOOLS, WARM, Cat, imported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning"),  # of its other providers
    pytest.mark.filterwarnings("ignore:(?s)Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(?s)Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def litellm(offline: None) -> Iterator[Any]:
    found = imported("litellm", "litellm")
    found.telemetry = False
    found.suppress_debug_info = True
    yield found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # its event loops are not closed: here, not in a later test
        gc.collect()


@pytest.fixture
def asked(url: str) -> dict[str, Any]:
    return {"model": "openai/model", "api_base": url, "api_key": "none", "max_retries": 0, "max_tokens": 9}


def test_chat(litellm: Any, asked: dict[str, Any], truth) -> None:
    answer = litellm.completion(messages=CHAT, **asked)
    assert answer.choices[0].message.content == truth(CHAT, max_new_tokens=9).text
    again = [*CHAT, answer.choices[0].message.model_dump(), {"role": "user", "content": "And"}]
    assert litellm.completion(messages=again, **asked).choices[0].finish_reason in ("stop", "length")


def test_stream(litellm: Any, asked: dict[str, Any], truth) -> None:
    chunks = list(litellm.completion(messages=CHAT, stream=True, stream_options={"include_usage": True}, **asked))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == truth(CHAT, max_new_tokens=9).text
    assert chunks[-1].usage.completion_tokens > 0


def test_async(litellm: Any, asked: dict[str, Any], truth) -> None:
    answer = asyncio.run(litellm.acompletion(messages=CHAT, **asked))
    assert answer.choices[0].message.content == truth(CHAT, max_new_tokens=9).text


def test_completions(litellm: Any, asked: dict[str, Any], truth) -> None:
    asked["model"] = "text-completion-openai/model"
    answer = litellm.text_completion(prompt=PROMPT, **asked)
    assert answer.choices[0].text == truth(PROMPT, max_new_tokens=9).text


def test_n(litellm: Any, asked: dict[str, Any], truth) -> None:
    answer = litellm.completion(messages=CHAT, n=2, **WARM, **asked)
    texts = [truth(CHAT, max_new_tokens=9, temperature=1.0, seed=5 + i).text for i in range(2)]
    assert [choice.message.content for choice in answer.choices] == texts


def test_logprobs(litellm: Any, asked: dict[str, Any], truth) -> None:
    answer = litellm.completion(messages=CHAT, logprobs=True, top_logprobs=2, **asked)
    logprobs = truth(CHAT, max_new_tokens=9, logprobs=2).logprobs
    found = [entry.logprob for entry in answer.choices[0].logprobs.content]
    assert found == pytest.approx([item.logprob for item in logprobs])


def test_penalties(litellm: Any, asked: dict[str, Any], truth) -> None:
    answer = litellm.completion(messages=CHAT, frequency_penalty=1.5, presence_penalty=0.5, **asked)
    expected = truth(CHAT, max_new_tokens=9, frequency_penalty=1.5, presence_penalty=0.5)
    assert answer.choices[0].message.content == expected.text


def test_structured(litellm: Any, asked: dict[str, Any], wide_url: str) -> None:
    asked |= {"api_base": wide_url, "max_tokens": 200}
    answer = litellm.completion(messages=CHAT, response_format=Cat, **asked)
    Cat.model_validate_json(answer.choices[0].message.content)


def test_tools(litellm: Any, asked: dict[str, Any], wide_url: str) -> None:
    asked |= {"api_base": wide_url, "max_tokens": 200}
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = litellm.completion(messages=CHAT, tools=TOOLS, tool_choice=named, **asked)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITIES
    told = [*CHAT, answer.choices[0].message.model_dump()]
    told += [{"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    assert litellm.completion(messages=told, **asked | {"max_tokens": 9}).choices[0].finish_reason in ("stop", "length")


def test_a_text_too_long(litellm: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": TOO_LONG}], **asked)
