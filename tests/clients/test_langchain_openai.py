"""`langchain-openai`: ChatOpenAI, and OpenAI, its class for plain completions."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.clients import CHAT, CITIES, PROMPT, TOO_LONG, TOOLS, WARM, Cat, imported

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::langchain_core")]


@pytest.fixture
def langchain(offline: None) -> Any:
    return imported("langchain_openai", "langchain-openai")


@pytest.fixture
def asked(url: str) -> dict[str, Any]:
    return {"model": "model", "base_url": url, "api_key": "none", "max_retries": 0, "max_tokens": 9}


def test_chat(langchain: Any, asked: dict[str, Any], truth) -> None:
    model = langchain.ChatOpenAI(**asked, temperature=0)
    answer = model.invoke(CHAT)
    assert answer.content == truth(CHAT, max_new_tokens=9).text
    assert answer.usage_metadata["output_tokens"] > 0
    again = [*CHAT, answer, {"role": "user", "content": "And"}]  # an answer is sent back as it came
    assert isinstance(model.invoke(again).content, str)


def test_stream(langchain: Any, asked: dict[str, Any], truth) -> None:
    chunks = list(langchain.ChatOpenAI(**asked, temperature=0, stream_usage=True).stream(CHAT))
    assert "".join(chunk.content for chunk in chunks) == truth(CHAT, max_new_tokens=9).text


def test_async(langchain: Any, asked: dict[str, Any], truth) -> None:
    answer = asyncio.run(langchain.ChatOpenAI(**asked, temperature=0).ainvoke(CHAT))
    assert answer.content == truth(CHAT, max_new_tokens=9).text


def test_completions(langchain: Any, asked: dict[str, Any], truth) -> None:
    model = langchain.OpenAI(**asked, temperature=0)
    text = truth(PROMPT, max_new_tokens=9).text
    assert model.invoke(PROMPT) == text
    assert "".join(model.stream(PROMPT)) == text
    assert [found[0].text for found in model.generate([PROMPT, PROMPT]).generations] == [text, text]


def test_n(langchain: Any, asked: dict[str, Any], truth) -> None:
    from langchain_core.messages import convert_to_messages

    messages = convert_to_messages(CHAT)
    found = langchain.ChatOpenAI(**asked, **WARM, n=2).generate([messages]).generations[0]
    texts = [truth(CHAT, max_new_tokens=9, temperature=1.0, seed=5 + i).text for i in range(2)]
    assert [item.text for item in found] == texts


def test_logprobs(langchain: Any, asked: dict[str, Any], truth) -> None:
    answer = langchain.ChatOpenAI(**asked, temperature=0, logprobs=True, top_logprobs=2).invoke(CHAT)
    logprobs = truth(CHAT, max_new_tokens=9, logprobs=2).logprobs
    found = [entry["logprob"] for entry in answer.response_metadata["logprobs"]["content"]]
    assert found == pytest.approx([item.logprob for item in logprobs])


def test_penalties(langchain: Any, asked: dict[str, Any], truth) -> None:
    model = langchain.ChatOpenAI(**asked, temperature=0, frequency_penalty=1.5, presence_penalty=0.5)
    expected = truth(CHAT, max_new_tokens=9, frequency_penalty=1.5, presence_penalty=0.5)
    assert model.invoke(CHAT).content == expected.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured(langchain: Any, asked: dict[str, Any], wide_url: str, method: str) -> None:
    model = langchain.ChatOpenAI(**asked | {"base_url": wide_url, "max_tokens": 200}, temperature=0)
    bound = model.with_structured_output(Cat, method=method, strict=True)
    assert isinstance(bound.invoke(CHAT), Cat)


def test_tools(langchain: Any, asked: dict[str, Any], wide_url: str) -> None:
    from langchain_core.messages import ToolMessage

    model = langchain.ChatOpenAI(**asked | {"base_url": wide_url, "max_tokens": 200}, temperature=0)
    bound = model.bind_tools(TOOLS, tool_choice="required", parallel_tool_calls=False)
    answer = bound.invoke(CHAT)
    (call,) = answer.tool_calls
    assert call["args"]["city"] in CITIES
    chunks = list(bound.stream(CHAT))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert [found["args"] for found in total.tool_calls] == [call["args"]]
    told = [*CHAT, answer, ToolMessage("It rains.", tool_call_id=call["id"])]
    assert isinstance(model.invoke(told, max_tokens=9).content, str)


def test_a_text_too_long(langchain: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="maximum context length") as caught:
        langchain.ChatOpenAI(**asked).invoke(TOO_LONG)
    assert caught.value.code == "context_length_exceeded"
