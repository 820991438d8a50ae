"""`openai`, OpenAI's own client, sync and async."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from support.clients import CHAT, CITIES, PROMPT, TOO_LONG, TOOLS, WARM, Cat


@pytest.fixture
def wide(wide_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=wide_url, api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["model"]


def test_chat(client: openai.OpenAI, truth) -> None:
    answer = client.chat.completions.create(model="model", messages=CHAT, max_tokens=9)
    assert answer.choices[0].message.content == truth(CHAT, max_new_tokens=9).text


def test_stream(client: openai.OpenAI, truth) -> None:
    with client.chat.completions.stream(model="model", messages=CHAT, max_tokens=9) as stream:  # checks every chunk
        found = stream.until_done().current_completion_snapshot.choices[0]
    done = truth(CHAT, max_new_tokens=9)
    assert (found.message.content, found.finish_reason) == (done.text, done.finish_reason)


def test_async(url: str, truth) -> None:
    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(model="model", messages=CHAT, max_tokens=9)
            chunks = await client.chat.completions.create(model="model", messages=CHAT, max_tokens=9, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            return answer.choices[0].message.content, streamed

    text = truth(CHAT, max_new_tokens=9).text
    assert asyncio.run(ask()) == (text, text)


def test_completions(client: openai.OpenAI, truth) -> None:
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=9, echo=True)
    assert answer.choices[0].text == PROMPT + truth(PROMPT, max_new_tokens=9).text


def test_n(client: openai.OpenAI, truth) -> None:
    answer = client.chat.completions.create(model="model", messages=CHAT, max_tokens=9, n=2, **WARM)
    texts = [truth(CHAT, max_new_tokens=9, temperature=1.0, seed=5 + i).text for i in range(2)]
    assert [choice.message.content for choice in answer.choices] == texts


def test_logprobs(client: openai.OpenAI, truth) -> None:
    answer = client.chat.completions.create(model="model", messages=CHAT, max_tokens=9, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    logprobs = truth(CHAT, max_new_tokens=9, logprobs=2).logprobs
    assert [entry.logprob for entry in found.content] == pytest.approx([item.logprob for item in logprobs])


def test_penalties(client: openai.OpenAI, truth) -> None:
    asked = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
    answer = client.chat.completions.create(model="model", messages=CHAT, max_tokens=12, **asked)
    assert answer.choices[0].message.content == truth(CHAT, max_new_tokens=12, **asked).text


def test_structured(wide: openai.OpenAI) -> None:
    answer = wide.chat.completions.parse(model="model", messages=CHAT, response_format=Cat)
    assert isinstance(answer.choices[0].message.parsed, Cat)
    with wide.chat.completions.stream(model="model", messages=CHAT, response_format=Cat) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_tools(wide: openai.OpenAI) -> None:
    asked = {
        "model": "model",
        "messages": CHAT,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    said = wide.chat.completions.create(**asked).choices[0].message
    (call,) = said.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITIES
    with wide.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    told = [*CHAT, said, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    answer = wide.chat.completions.create(model="model", messages=told, tools=TOOLS, tool_choice="none", max_tokens=9)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_text_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="model", prompt=TOO_LONG, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
