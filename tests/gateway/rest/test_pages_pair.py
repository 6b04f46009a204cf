"""The open pair of the gallery in a real headless Chromium, before a real service."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, Route, expect

from tests.conftest import Service
from tests.support.browser import READY, drawn, having, opened

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.browser]

SAMPLES = "/v1/models/faces/samples"


def dialog_of(page: Page) -> Locator:
    return page.get_by_role("dialog")


def heading_of(page: Page) -> Locator:
    return dialog_of(page).get_by_role("heading", level=2)


async def shown(page: Page, seed: int) -> None:
    """Wait until the open pair is the one of a seed, complete."""
    await expect(heading_of(page)).to_have_text(f"Seed {seed}")
    await expect(dialog_of(page)).to_have_attribute("aria-busy", "false")


async def test_a_pair_opens_turns_and_closes_by_keyboard(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/?seed=3&count=3") as page:
        await expect(page.locator(READY)).to_have_count(3)
        await page.get_by_role("link", name="Seed 4").focus()
        await page.keyboard.press("Enter")
        await shown(page, 4)
        await expect(page).to_have_url(having("pair=4"))
        await page.keyboard.press("ArrowRight")
        await shown(page, 5)
        await expect(page.get_by_role("button", name="Next pair")).to_be_disabled()
        await page.keyboard.press("ArrowRight")
        await shown(page, 5)
        await page.keyboard.press("ArrowLeft")
        await page.keyboard.press("ArrowLeft")
        await shown(page, 3)
        await expect(page).to_have_url(having("pair=3"))
        field = dialog_of(page).get_by_label("From layer")
        await field.focus()
        await page.keyboard.press("ArrowRight")
        await shown(page, 3)  # the arrows belong to a field that has the focus
        await page.keyboard.press("Escape")
        await expect(page.locator("dialog[open]")).to_have_count(0)
        await expect(page.get_by_role("link", name="Seed 3")).to_be_focused()
        assert "pair" not in page.url
        assert await page.locator(READY).count() == 3, "the pairs stay as they are"


async def test_a_pair_opens_turns_and_closes_by_mouse(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/?seed=3&count=2") as page:
        await expect(page.locator(READY)).to_have_count(2)
        await page.locator(".pair .pictures").first.click(force=True)  # the link lies over it
        await shown(page, 3)
        await expect(page.get_by_role("button", name="Previous pair")).to_be_disabled()
        await page.get_by_role("button", name="Next pair").click()
        await shown(page, 4)
        await expect(heading_of(page)).to_be_focused()  # the button, now disabled, would lose the keyboard
        await page.get_by_role("button", name="Close").click()
        await expect(page.get_by_role("link", name="Seed 4")).to_be_focused()


async def test_an_open_pair_shows_the_sample(chromium: Browser, service: Service, http: httpx.Client) -> None:
    sample = http.get(f"{SAMPLES}/3", params={"include_rejected": True, "max_quantile": 0.5}).json()
    with np.load(io.BytesIO(http.get(f"{SAMPLES}/3.npz?include_rejected=true").content)) as arrays:
        label = arrays["label"]
    classes = http.get("/v1/models/faces").json()["classes"]
    palette = np.array([[int(entry["rgb"][i : i + 2], 16) for i in (1, 3, 5)] for entry in classes], np.uint8)
    async with opened(chromium, f"{service.http}/?count=1&view=label&max_quantile=0.5&pair=3") as page:
        await shown(page, 3)
        facts = page.locator("#facts")
        await expect(page.locator("#open-verdict")).to_have_text("accepted" if sample["accepted"] else "rejected")
        await expect(facts).to_contain_text(f"{sample['js_score']:.4g} nats")
        await expect(facts).to_contain_text(f"{sample['threshold']:.4g} nats (quantile 0.5)")
        await expect(facts).to_contain_text(sample["model_digest"][:16])
        picture = await drawn(page, selector="#open-canvas")
        scale = picture.shape[0] // label.shape[0]
        assert np.array_equal(picture[scale // 2 :: scale, scale // 2 :: scale], palette[label])
        hair = (label == [entry["name"] for entry in classes].index("hair")).mean() * 100
        await expect(page.locator("#holds li").filter(has_text="hair")).to_have_text(re.compile(f"hair{hair:.3g} %"))
        await dialog_of(page).get_by_role("radio", name="Uncertainty").check()
        await expect(page.get_by_role("img", name="Uncertainty of each pixel of seed 3")).to_be_visible()
        await expect(page).to_have_url(having("view=uncertainty"))


@pytest.mark.parametrize("mixed", [False, True])
async def test_the_links_download_what_rest_gives(
    chromium: Browser, service: Service, http: httpx.Client, mixed: bool, tmp_path: Path
) -> None:
    calibration = http.get("/v1/models/faces").json()["calibration"]
    if mixed:
        asked = {"style_seed": 9, "crossover": 4, "max_js": calibration["threshold"], "include_rejected": True}
        address, name = "&style_seed=9&crossover=4", "faces-7-style-9-from-4"
    else:
        asked, address, name = {"max_quantile": 0.9, "include_rejected": True}, "", "faces-7"
    suffixes = {"json": "", "npz": ".npz", "image.png": "/image.png", "label.png": "/label.png"}
    async with opened(chromium, f"{service.http}/?count=1&pair=7{address}") as page:
        await shown(page, 7)
        for ending, suffix in suffixes.items():
            async with page.expect_download() as coming:
                await dialog_of(page).get_by_role("link", name=ending, exact=True).click()
            download = await coming.value
            assert download.suggested_filename == f"{name}.{ending}"
            await download.save_as(tmp_path / ending)
            assert (tmp_path / ending).read_bytes() == http.get(f"{SAMPLES}/7{suffix}", params=asked).content


async def test_a_download_carries_the_token(chromium: Browser, service: Service, http: httpx.Client) -> None:
    async with opened(chromium, f"{service.http}/metrics") as page:

        async def guard(route: Route) -> None:
            right = route.request.headers.get("authorization") == "Bearer right"
            await (route.continue_() if right else route.fulfill(status=401, json={}))

        await page.route("**/v1/**", guard)
        await page.goto(f"{service.http}/?count=1&pair=7")
        await page.get_by_label("Access token").fill("right")
        await page.keyboard.press("Enter")
        await shown(page, 7)
        async with page.expect_download() as coming:
            await dialog_of(page).get_by_role("link", name="image.png").click()
        download = await coming.value
        assert download.suggested_filename == "faces-7.image.png"
        expected = http.get(f"{SAMPLES}/7/image.png?include_rejected=true").content
        assert (await download.path()).read_bytes() == expected


async def test_a_link_to_a_pair_opens_it(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/?seed=3&count=2&view=label") as page:
        await expect(page.locator(READY)).to_have_count(2)
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        card = await page.get_by_role("link", name="Seed 4").get_attribute("href")
        await page.get_by_role("link", name="Seed 4").click()
        await shown(page, 4)
        await page.get_by_role("button", name="Copy link").click()
        await expect(page.get_by_role("button", name="Copied")).to_be_visible()
        copied = await page.evaluate("() => navigator.clipboard.readText()")
        assert copied == page.url == service.http + "/" + str(card)
    async with opened(chromium, copied) as page:
        await shown(page, 4)
        await expect(dialog_of(page).get_by_role("radio", name="Label")).to_be_checked()
        assert page.url == copied
        await page.keyboard.press("Escape")
        await expect(page.locator(READY)).to_have_count(2)


async def test_style_mixing(chromium: Browser, service: Service, http: httpx.Client) -> None:
    threshold = http.get("/v1/models/faces").json()["calibration"]["threshold"]
    asked = {"style_seed": 9, "crossover": 4, "max_js": threshold, "include_rejected": True}
    mixed = http.get(f"{SAMPLES}/3", params=asked).json()
    image = http.get(f"{SAMPLES}/3/image.png", params=asked).content
    async with opened(chromium, f"{service.http}/?seed=3&count=2&pair=3") as page:
        await shown(page, 3)
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url))
        await expect(page.locator("#mixing-gate")).to_contain_text(f"explicitly: max_js={threshold:.4g}")
        await page.get_by_label("Style seed").fill("9")
        await page.get_by_label("From layer").fill("4")
        await page.get_by_role("button", name="Mix", exact=True).click()
        picture = page.get_by_role("img", name=re.compile("seed 3, with the style of seed 9: "))
        await expect(picture.first).to_be_visible()
        await expect(page).to_have_url(having("style_seed=9"))
        await expect(page.locator("#facts")).to_contain_text(mixed["group_id"][:16])
        await expect(page.locator("#open-verdict")).to_have_text("accepted" if mixed["accepted"] else "rejected")
        query = parse_qs(urlsplit(next(url for url in sent if "style_seed" in url)).query)
        assert query["max_js"] == [str(threshold)] and "max_quantile" not in query
        source = await page.locator("#open-image").get_attribute("src")
        assert base64.b64decode(str(source).partition(",")[2]) == image
        await page.get_by_label("From layer").fill("12")  # the last is 11
        await page.get_by_role("button", name="Mix", exact=True).click()
        await expect(page).to_have_url(having("crossover=4"))
        await page.get_by_role("button", name="Unmix").click()
        await expect(page.locator("#open-image")).to_have_attribute("alt", re.compile("^Generated image of seed 3: "))
        assert "style_seed" not in page.url


async def test_an_address_of_a_pair_that_cannot_be_is_told(chromium: Browser, service: Service) -> None:
    address = f"{service.http}/?count=1&pair=7&style_seed=3&crossover=12"
    async with opened(chromium, address) as page:
        await shown(page, 7)
        notice = dialog_of(page).get_by_role("alert")
        await expect(notice).to_contain_text('asks for crossover "12"; it must be a whole number from 1 to 11')
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("alert")).to_be_visible()  # back on the page
        await page.goto(f"{service.http}/?count=1&style_seed=3")
        await expect(page.get_by_role("alert")).to_contain_text("style mixing needs pair, style_seed and crossover")


async def test_an_open_pair_that_fails_or_must_wait_says_so(chromium: Browser, service: Service) -> None:
    """The answers are made here: the demo's model does not fail at will."""
    async with opened(chromium, f"{service.http}/?count=2") as page:
        await expect(page.locator(READY)).to_have_count(2)
        answers = [{"status": 502, "json": {"detail": "Triton failed to run the model"}}]
        answers += [{"status": 503, "headers": {"Retry-After": "1000"}, "json": {"detail": "Triton is gone."}}]

        async def answer(route: Route) -> None:
            await (route.fulfill(**answers.pop(0)) if answers else route.continue_())  # type: ignore[arg-type]

        await page.route("**/samples/*", answer)
        await page.get_by_role("link", name="Seed 0").click()
        await expect(page.locator("#open-failure")).to_have_text("Triton failed to run the model")
        await page.keyboard.press("ArrowRight")
        await expect(dialog_of(page).get_by_role("alert")).to_contain_text("The service is not ready. Triton is gone.")
        await page.get_by_role("button", name="Try again now").click()
        await shown(page, 1)
        await expect(page.locator("#open-failure")).to_have_text("")
        await expect(page.locator("#open-verdict")).to_have_text(re.compile("accepted|rejected"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["overlay", "uncertainty"])
async def test_accessibility_audit(chromium: Browser, service: Service, scheme: str, view: str) -> None:
    address = f"{service.http}/?count=2&view={view}&pair=1&style_seed=3&crossover=4&where=hair:0.01..&seed=x"
    async with opened(chromium, address, scheme=scheme) as page:
        await shown(page, 1)
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        await page.keyboard.press("Escape")
        await expect(page.locator(READY)).to_have_count(2)
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
