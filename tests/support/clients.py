"""What every client of OpenAI's API asks in tests/clients."""

from __future__ import annotations

from typing import Any

CHAT: list[dict[str, Any]] = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
PROMPT = "Once upon a time"
TOO_LONG = "a dog " * 100  # more than the context of the served model
WARM: dict[str, Any] = {"temperature": 1.0, "seed": 5}
