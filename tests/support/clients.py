"""What every client of OpenAI's API asks in tests/clients."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

CHAT: list[dict[str, Any]] = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
PROMPT = "Once upon a time"
TOO_LONG = "a dog " * 100  # more than the context of the served model
CITIES = ("Oslo", "Rome")
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": list(CITIES)}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


class Cat(BaseModel):
    """A cat."""

    model_config = ConfigDict(extra="forbid")  # a random model would add properties without end

    colour: Literal["red", "grey"]
    age: Annotated[int, Field(ge=0, le=9)]


WARM: dict[str, Any] = {"temperature": 1.0, "seed": 5}


def imported(module: str, package: str) -> Any:
    """A client's module, without the warnings of what it imports; the test is skipped where the package is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"{package} is not installed (make test-all installs it)")
