"""The browser of the tests of the gallery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.conftest import need_program

if TYPE_CHECKING:
    from playwright.async_api import Browser


@pytest_asyncio.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    from playwright.async_api import async_playwright  # here: the other tests need no browser

    program = need_program("chromium", "chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program)
        yield browser
        await browser.close()
