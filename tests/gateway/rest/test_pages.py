"""Tests of /docs without the packages of the extra `docs`."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

SCRIPT = """
import sys
sys.modules["fastapi_swagger"] = None
from labelmint.gateway.rest.pages import PAGES
print(*(path for path in PAGES if "docs" in path), PAGES["/docs"].media_type, PAGES["/docs"].body.decode())
"""


def test_without_swagger_ui_the_page_names_the_document_and_the_extra() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("/docs text/plain ")
    assert "openapi.json" in done.stdout and "extra `docs`" in done.stdout
