"""The gallery at `/`: a web page made of static files in the package.

Rules of this file:
- The page is an ordinary client of the REST API. Everything that it shows comes from /v1.
- The page loads nothing from other servers and runs no inline scripts. Its Content-Security-Policy enforces both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Response

GALLERY_PATHS = ("/", "/gallery.css", "/gallery.js", "/favicon.ico")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "ico": "image/x-icon"}


def add_gallery(app: FastAPI) -> None:
    """Register the page's routes. They return no data of the service, so they need no token."""
    for path in GALLERY_PATHS:
        name = {"/": "gallery.html", "/favicon.ico": "gallery.ico"}.get(path, path[1:])
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(_file(name))


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    content = (files(__package__) / name).read_bytes()
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}

    async def endpoint() -> Response:
        return Response(content, headers=headers, media_type=_MEDIA_TYPES[name.rpartition(".")[2]])

    return endpoint
