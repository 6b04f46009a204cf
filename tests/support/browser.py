"""A page in Chromium, and what the gallery shows on one.

Rules of this file:
- Each page is of its own, with nothing remembered, and its console must say nothing wrong.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from PIL import Image
from playwright.async_api import Browser, ConsoleMessage, Locator, Page, expect

MILLISECONDS = 60_000  # machines that test are busy
READY = ".pair[data-verdict]"
expect.set_options(timeout=MILLISECONDS)


@asynccontextmanager
async def opened(
    chromium: Browser, address: str, *, width: int = 1280, height: int = 900, scheme: str = "light", touch: bool = False
) -> AsyncIterator[Page]:
    """A page of its own, with nothing remembered. That the console said nothing wrong is asserted at the end."""
    context = await chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
        has_touch=touch,
    )
    context.set_default_timeout(MILLISECONDS)
    page = await context.new_page()
    wrong: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        # Chromium itself reports each answer with an error status; the tests of those look at the page.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            wrong.append(message.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    await page.goto(address)
    try:
        yield page
    finally:
        await context.close()
    assert not wrong


def seeds_of(page: Page) -> Locator:
    return page.locator(".pair .seed")


def having(text: str) -> re.Pattern[str]:
    """An address with this in its query. The browser tells of a new one in its own time."""
    return re.compile(rf"[?&]{re.escape(text)}(&|$)")


async def verdicts(page: Page) -> list[str | None]:
    return [await card.get_attribute("data-verdict") for card in await page.locator(".pair").all()]


async def drawn(page: Page, card: int = 0, selector: str = ".pair canvas") -> np.ndarray:
    """What the right picture of a pair shows, uint8 [side,side,3]."""
    data = await page.locator(selector).nth(card).evaluate("canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))
