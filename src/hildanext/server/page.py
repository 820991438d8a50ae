"""The web page at /: files of this package, read once. Nothing but these can be asked for, so no path leads out of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

WEB = Path(__file__).parent / "web"
# By name: what the machine's own table says of .js may be another, and browsers then refuse it.
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
    """Every file of the page, by its name."""
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
            raise HTTPException(404, "there is no such file")
        return _answer(request, files[name])

    return router


def _answer(request: Request, file: StaticFile) -> Response:
    """The file, or 304 to a browser that has it. `no-cache`: it asks each time, so a new version is seen at once."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
