"""A server that the clients talk to, and the engine that knows the answers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hildanext.config import Config
from hildanext.decoding.engines import Completion, Request, open_engine
from support import serving
from support.models import write_converted


@pytest.fixture(scope="module")
def url(converted: Config) -> Iterator[str]:
    """The base URL that a client is given. The served model is named 'model', its context has 64 tokens."""
    with serving.running(converted) as (found, _):
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def wide_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """As `url`, but the context has room for tools and what they answer: 1024 tokens."""
    with serving.running(write_converted(tmp_path_factory.mktemp("wide"), context=1024)) as (found, _):
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def truth(converted: Config) -> Callable[..., Completion]:
    """`truth(prompt, **settings)`: the completion straight from an engine."""
    engine = open_engine(converted)

    def complete(prompt: Any, **changes: Any) -> Completion:
        return engine.generate(Request(engine.encode(prompt), engine.settings(converted)._replace(**changes)))

    return complete


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """Some libraries leave connections open. Python warns of them when it collects them, which may be in another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library reports home or looks for a newer version of anything."""
    for name, value in {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "LANGCHAIN_TRACING_V2": "false",
        "LANGSMITH_TRACING": "false",
        "DO_NOT_TRACK": "1",
        "OPENAI_API_KEY": "none",
    }.items():
        monkeypatch.setenv(name, value)
