"""`instructor`: answers as pydantic models, by each of its ways to ask for them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from support.clients import CHAT, Cat, imported

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::instructor")]

ASKED = {"model": "model", "messages": CHAT, "response_model": Cat, "max_retries": 0}


@pytest.fixture
def instructor(offline: None) -> Any:
    return imported("instructor", "instructor")


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_structured(instructor: Any, wide_url: str) -> None:
    asking = instructor.from_openai(client(wide_url), mode=instructor.Mode.JSON_SCHEMA)
    assert isinstance(asking.chat.completions.create(**ASKED), Cat)


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT"])
def test_tools(instructor: Any, wide_url: str, mode: str) -> None:
    asking = instructor.from_openai(client(wide_url), mode=instructor.Mode[mode])
    assert isinstance(asking.chat.completions.create(**ASKED), Cat)


def test_stream(instructor: Any, wide_url: str) -> None:
    asking = instructor.from_openai(client(wide_url), mode=instructor.Mode.JSON_SCHEMA)
    partial = list(asking.chat.completions.create_partial(**ASKED))
    whole = asking.chat.completions.create(**ASKED)
    assert partial[-1].model_dump() == whole.model_dump()


def test_async(instructor: Any, wide_url: str) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=wide_url, api_key="none", max_retries=0) as plain:
            asking = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
            return await asking.chat.completions.create(**ASKED)

    assert isinstance(asyncio.run(ask()), Cat)
