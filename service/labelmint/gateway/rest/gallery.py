"""The gallery at `/`: a page for people, in static files that travel with the package.

Rules of this file:
- The page is one more client of the REST wire: everything that it shows comes from /v1.
- It loads nothing from elsewhere and runs nothing inline; the policy that it is sent with enforces that.
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
    """Register the page's routes. They hold no data and need no token."""
    for path in GALLERY_PATHS:
        name = {"/": "gallery.html", "/favicon.ico": "gallery.ico"}.get(path, path[1:])
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(_file(name))


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    content = (files(__package__) / name).read_bytes()
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}

    async def endpoint() -> Response:
        return Response(content, headers=headers, media_type=_MEDIA_TYPES[name.rpartition(".")[2]])

    return endpoint
