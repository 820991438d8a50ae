"""GET /settings against the settings that requests then get."""

from __future__ import annotations

import json
from typing import Any

from fastapi.testclient import TestClient

from hildanext.config import DecodeConfig
from hildanext.server.app import make_app
from support import serving
from support.serving import dummy


def used(client: TestClient, **asked: Any) -> dict[str, Any]:
    """The settings in the `start` event of a request, those that are keys of the configuration."""
    answer = client.post("/generate", json={"prompt": "x", "stream": True, **asked}).text
    settings: dict[str, Any] = json.loads(answer.split("\n")[1].removeprefix("data: "))["settings"]
    return {name: value for name, value in settings.items() if name in DecodeConfig.model_fields}


def test_the_defaults_are_what_a_request_gets() -> None:
    config = dummy({"tau_mask": 0.9, "tau_edit": None, "max_new_tokens": 7, "top_k": 5, "stop": ["end"], "seed": 3})
    with serving.client(config) as client:
        found = client.get("/settings").json()
        assert found.pop("default") == used(client)
        modes = found.pop("modes")
        assert list(modes) == ["Q_MODE", "S_MODE"]
        for mode, settings in modes.items():
            assert settings == used(client, mode=mode)
            assert settings["tau_edit"] is not None  # a mode brings its own
        assert found == {"deadline_s": config.server.deadline_s, "context": None}


def test_a_seed_that_is_drawn_is_null() -> None:
    with serving.client(dummy({"temperature": 0.5})) as client:
        assert client.get("/settings").json()["default"]["seed"] is None


def test_while_the_model_loads_there_are_none() -> None:
    app = make_app(dummy(), lambda config: None, [])  # type: ignore[arg-type, return-value]
    answer = TestClient(app, base_url="http://127.0.0.1:8000").get("/settings")  # no lifespan: the engine never opens
    assert (answer.status_code, answer.json()) == (503, {"detail": "the server is loading"})
