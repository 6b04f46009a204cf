"""The static pages: the gallery at `/`, and Swagger UI at /docs.

Rules of this file:
- The gallery is an ordinary client of the REST API. Everything that it shows comes from /v1.
- The pages load nothing from other servers and run no inline scripts. Their Content-Security-Policies enforce both, and
  Swagger UI's also allows what Swagger UI needs.
- The package `fastapi-swagger` (extra `docs`) ships a current Swagger UI. Only its static files are used. Without the
  package, /docs says where the OpenAPI document is.
- The pages return no data of the service, so they need no token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files

from fastapi import FastAPI, Response

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SWAGGER_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SWAGGER_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>labelmint: REST</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<style>.opblock-head { display: none } /* repeats every GET */</style>
</head>
<body>
<main id="swagger-ui"></main>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_SWAGGER_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});\n'
_WITHOUT_SWAGGER = "openapi.json describes the API. To see it on this page, install labelmint with the extra `docs`.\n"


def _gallery_file(name: str, media_type: str) -> Response:
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Cache-Control": "no-cache"}
    return Response((files(__package__) / name).read_bytes(), headers=headers, media_type=media_type)


def _modules() -> list[str]:
    """The names of the gallery's scripts: ES modules, of which page.js imports the others."""
    return sorted(file.name for file in (files(__package__) / "gallery").iterdir())


GALLERY: Mapping[str, Response] = {
    "/": _gallery_file("gallery.html", "text/html"),
    "/gallery.css": _gallery_file("gallery.css", "text/css"),
    "/favicon.ico": _gallery_file("gallery.ico", "image/x-icon"),
    **{f"/gallery/{name}": _gallery_file(f"gallery/{name}", "text/javascript") for name in _modules()},
}


def _swagger() -> Mapping[str, Response]:
    try:
        resources = files("fastapi_swagger") / "resources"
    except ModuleNotFoundError:
        return {"/docs": Response(_WITHOUT_SWAGGER, media_type="text/plain")}
    keep = {"Cache-Control": "private, max-age=3600"}
    script, style = ((resources / name).read_bytes() for name in ("swagger-ui-bundle.js", "swagger-ui.css"))
    policy = {"Content-Security-Policy": _SWAGGER_POLICY}
    return {
        "/docs": Response(_SWAGGER_PAGE, headers=policy, media_type="text/html"),
        "/docs/start.js": Response(_SWAGGER_START, media_type="text/javascript"),
        "/docs/swagger-ui-bundle.js": Response(script, headers=keep, media_type="text/javascript"),
        "/docs/swagger-ui.css": Response(style, headers=keep, media_type="text/css"),
    }


PAGES: Mapping[str, Response] = {**GALLERY, **_swagger()}


def add_pages(app: FastAPI) -> None:
    for path, response in PAGES.items():
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(_always(response))


def _always(response: Response) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return response

    return endpoint
