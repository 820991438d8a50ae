"""The OpenAPI document: FastAPI's own, with the API key that a server asks for."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from hildanext.server.guard import OPEN_PATHS


def describe_keys(app: FastAPI) -> None:
    """Make `app.openapi` say that requests carry a key, and which paths need none."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in OPEN_PATHS & set(document["paths"]):
            for operation in document["paths"][path].values():
                operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]
