"""What every client of OpenAI's API asks in tests/clients."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
    """A cat, and nothing else: a random model would go on with more properties."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "grey"]
    age: Annotated[int, Field(ge=0, le=9)]


WARM: dict[str, Any] = {"temperature": 1.0, "seed": 5}
