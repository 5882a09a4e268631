"""The files of the live page, which need nothing from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
FIRST = "index.html"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Whatever a name of an instance or a note might hold: the page runs its own files only, and asks its own gateway only.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "cache-control": "no-cache",  # a browser asks each time, so that no page is of another version than its gateway
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class PageFile:
    """One file, answered with its ETag: a browser that has it gets no copy."""

    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._type = TYPES[path.suffix]
        self._headers = {**HEADERS, "etag": f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'}

    async def answer(self, request: Request) -> Response:
        """The file, or that it has not changed."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._headers["etag"] in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers, media_type=self._type)


def routes(folder: Path = FOLDER) -> list[Route]:
    """A path for each file of the page; the first one's is /."""
    files = sorted(path for path in folder.iterdir() if path.suffix in TYPES)
    return [Route(f"/{'' if path.name == FIRST else path.name}", PageFile(path).answer) for path in files]
