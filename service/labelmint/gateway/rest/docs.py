"""The page at /docs: Swagger UI, served by the gateway itself without any external resource.

Rules of this file:
- The package `fastapi-swagger` (extra `docs`) ships a current Swagger UI. Only its static files are used. Without the
  package, /docs says where the OpenAPI document is.
- The page's Content-Security-Policy allows what Swagger UI needs. It applies to this page only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Response

DOCS_PATHS = ("/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css")

_POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
_KEEP = {"Cache-Control": "private, max-age=3600"}
_PAGE = """<!doctype html>
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
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});\n'
_WITHOUT = "The API is described by openapi.json. Install labelmint with its extra `docs` to see it here.\n"


def install(app: FastAPI) -> None:
    """Serve /docs."""
    try:
        resources = files("fastapi_swagger") / "resources"
    except ModuleNotFoundError:
        app.get("/docs", include_in_schema=False)(_always(Response(_WITHOUT, media_type="text/plain")))
        return

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return Response(_PAGE, media_type="text/html", headers=_POLICY)

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(_START, media_type="text/javascript")

    for name, media_type in (("swagger-ui-bundle.js", "text/javascript"), ("swagger-ui.css", "text/css")):
        data = (resources / name).read_bytes()
        response = Response(data, media_type=media_type, headers=_KEEP)
        app.get(f"/docs/{name}", include_in_schema=False)(_always(response))


def _always(response: Response) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return response

    return endpoint
