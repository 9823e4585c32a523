"""Serves the files of the page: read once, at fixed paths, each with the same strict headers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final

from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

PATH: Final = "/playground"
"""Of the page; its files are below it."""
FILES_LABEL: Final = f"{PATH}/"
"""Under which the metrics count the files, all together."""
FOLDER: Final = Path(__file__).parent / "static"
PAGE: Final = "index.html"
TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY: Final = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob: data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    # Text of a user or of a file name cannot become markup.
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
HEADERS: Final = {
    "Content-Security-Policy": "; ".join(POLICY),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Kept, but asked for each time: after an upgrade no file of the old version is used.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    async def answer(self, request: Request) -> Response:
        """The file, or 304 to a browser that has it."""
        headers = {**HEADERS, "ETag": self.etag}
        if _names(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


class Playground:
    """The routes of the page.

    Args:
        folder: holds `index.html` and the files that it loads. Files of other types than `TYPES` are ignored.

    Attributes:
        routes: one for each file, with no parameter in its path.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.routes = [
            Route(PATH if path.name == PAGE else f"{PATH}/{path.name}", _read(path).answer, methods=["GET"])
            for path in sorted(folder.iterdir())
            if path.suffix in TYPES
        ]

    @property
    def paths(self) -> frozenset[str]:
        """The paths of all routes."""
        return frozenset(route.path for route in self.routes)


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _names(if_none_match: str, etag: str) -> bool:
    """Whether a header If-None-Match names this tag, weak or strong."""
    named = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return bool(named & {etag, "*"})
