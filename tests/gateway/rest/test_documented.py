"""The OpenAPI document is exact: schemathesis holds a real service to it, with all its checks."""

from pathlib import Path

import httpx
import pytest

from tests.conftest import Service
from tests.torture.openapi import explore

pytestmark = pytest.mark.triton


def test_schemathesis_finds_nothing(service: Service, http: httpx.Client, tmp_path: Path) -> None:
    outcome = explore(service, tmp_path, 3, 60)
    assert outcome.tries > 0 and not outcome.findings, "\n".join(outcome.findings)
    assert http.get("/readyz").status_code == 200


def test_every_route_is_described(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        assert {"get", "head"} <= operations.keys() or operations.keys() == {"post"}, path
        for operation in operations.values():
            assert operation["summary"] and operation["operationId"]
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and "head" not in operation["operationId"]:
                    assert list(answer["content"]) == ["application/problem+json"], (path, status)
    assert "Problem" in document["components"]["schemas"]
    assert "HTTPValidationError" not in str(document)


def test_the_docs_load_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200 and "//" not in page.text.replace("<!doctype", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js"):
        assert f"docs/{name}" in page.text and http.get(f"/docs/{name}").status_code == 200
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "script-src" not in http.get("/v1/models").headers["content-security-policy"]


def test_every_method_that_a_path_has_is_allowed(http: httpx.Client) -> None:
    for method, path, allowed in (
        ("DELETE", "/v1/models/faces/samples/7", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("GET", "/v1/models/faces/samples:batchGet", "POST"),
    ):
        answer = http.request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"] == allowed
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_whole_number_may_be_written_with_a_point(http: httpx.Client) -> None:
    """As JSON Schema has it; what is no number, or not whole, is no seed."""
    path, options = "/v1/models/faces/samples:batchGet", {"max_js": 1e9}
    whole, pointed = (http.post(path, json={"seeds": seeds, **options}) for seeds in ([7, 8], [7.0, 8]))
    assert whole.status_code == pointed.status_code == 200 and whole.content == pointed.content
    for seed in (7.5, "7", True, None):
        answer = http.post(path, json={"seeds": [seed], **options})
        assert answer.status_code == 400 and answer.json()["metadata"] == {"field": "seeds.0"}
