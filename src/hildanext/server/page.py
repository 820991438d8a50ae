"""The web page at /. Its files are read once at startup; a request can name only these, so no path can escape."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

WEB = Path(__file__).parent / "web"
# Fixed: the system's table may map .js to another type, which browsers refuse.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class StaticFile(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def read_files() -> dict[str, StaticFile]:
    """Return every file of the page by name."""
    found = {}
    for path in sorted(WEB.iterdir()):
        content = path.read_bytes()
        found[path.name] = StaticFile(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def page_routes() -> APIRouter:
    router, files = APIRouter(include_in_schema=False), read_files()

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    @router.api_route("/web/{name}", methods=["GET", "HEAD"])
    async def web_file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, "no such file")
        return _answer(request, files[name])

    return router


def _answer(request: Request, file: StaticFile) -> Response:
    """Return the file, or 304 if the browser has it. `no-cache` makes browsers check for a new version each time."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
