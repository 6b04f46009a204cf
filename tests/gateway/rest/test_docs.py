"""Tests of /docs without the packages of the extra `docs`."""

import sys

import httpx
import pytest
from fastapi import FastAPI

from labelmint.gateway.rest import docs

pytestmark = pytest.mark.unit


async def test_without_swagger_ui_the_page_names_the_document_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi_swagger", None)
    app = FastAPI(docs_url=None)
    docs.install(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        page = await client.get("/docs")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/plain")
        assert "openapi.json" in page.text and "extra `docs`" in page.text
        assert (await client.get("/docs/start.js")).status_code == 404
