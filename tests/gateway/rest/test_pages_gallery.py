"""The gallery in a real headless Chromium, before a real service."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, Request, Route, expect

from labelmint.core.executor import CALIBRATIONS
from labelmint.core.heat import heat_colours
from labelmint.gateway.rest.pages import CONTENT_SECURITY_POLICY, GALLERY
from labelmint.triton.model_config import read_config, write_config
from tests.conftest import REPOSITORY, Service, start_service
from tests.support.browser import READY, drawn, having, opened, seeds_of, verdicts

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.browser]


KEYPOINTS = "faces_keypoints"


@pytest.fixture(scope="module")
def uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The committed models, the keypoint model without its calibration."""
    directory = tmp_path_factory.mktemp("gallery")
    repository = directory / "repository"
    shutil.copytree(REPOSITORY, repository)
    config = read_config(repository / KEYPOINTS / "config.pbtxt")
    for name in CALIBRATIONS:
        del config.parameters[name]
    write_config(repository / KEYPOINTS / "config.pbtxt", config)
    running = start_service(directory / "serve.log", repository=repository)
    yield running
    assert running.stop() == 0, running.log.read_text()


async def press_until(page: Page, key: str, focused: str) -> None:
    """Press a key until what has the focus matches a selector."""
    for _ in range(80):
        if await page.evaluate("selector => document.activeElement.matches(selector)", focused):
            return
        await page.keyboard.press(key)
    raise AssertionError(f"{focused} cannot be reached with {key}")


async def test_pairs_appear_and_nothing_is_asked_elsewhere(chromium: Browser, service: Service) -> None:
    context = await chromium.new_context(viewport={"width": 1280, "height": 900})
    page = await context.new_page()
    asked: list[str] = []
    now = most = 0

    def begin(request: Request) -> None:
        nonlocal now, most
        asked.append(request.url)
        now += "/samples/" in request.url
        most = max(most, now)

    def end(request: Request) -> None:
        nonlocal now
        now -= "/samples/" in request.url

    page.on("request", begin)
    page.on("requestfinished", end)
    await page.goto(f"{service.http}/?count=48")
    await expect(page.locator(".pair")).to_have_count(48)
    await expect(page.locator(".pair").first).to_have_attribute("data-verdict", re.compile("accepted|rejected"))
    await expect(page.get_by_role("status")).to_contain_text("Seeds 0 to 47.")
    await expect(page.get_by_role("img", name=re.compile("^Generated image of seed 0: .* nats"))).to_be_visible()
    await expect(page.get_by_role("img", name="Label over the image of seed 0")).to_be_visible()
    await page.wait_for_load_state("networkidle")
    asked_of = {urlsplit(url).netloc for url in asked if not url.startswith("data:")}
    assert asked_of == {urlsplit(service.http).netloc}
    assert 1 <= most <= 2, "requests in flight at once"
    loaded = sum("/samples/" in url for url in asked)
    assert loaded < 48, "pairs far below the window are left alone"
    await page.locator(".pair").last.scroll_into_view_if_needed()
    await expect(page.locator(".pair").last).to_have_attribute("data-verdict", re.compile("accepted|rejected"))
    await context.close()


def test_the_page_is_static_and_strict(http: httpx.Client) -> None:
    for path in GALLERY:
        answer = http.get(path)
        assert answer.status_code == http.head(path).status_code == 200
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "/" not in http.get("/openapi.json").json()["paths"]


async def test_the_gate_decides_as_the_service_does(chromium: Browser, service: Service, http: httpx.Client) -> None:
    async with opened(chromium, f"{service.http}/?count=6") as page:
        await expect(page.locator(READY)).to_have_count(6)
        for quantile in ("0.3", "0.75", "0.9"):
            await page.get_by_role("slider").fill(quantile)
            query = {"seeds": list(range(6)), "max_quantile": float(quantile), "include_rejected": True}
            outcomes = http.post("/v1/models/faces/samples:batchGet", json=query).json()["outcomes"]
            expected = ["accepted" if outcome["accepted"] else "rejected" for outcome in outcomes]
            await expect(page).to_have_url(having(f"max_quantile={quantile}"))
            rejected = f"{expected.count('accepted')} accepted, {expected.count('rejected')} rejected"
            await expect(page.get_by_role("status")).to_contain_text(rejected)
            assert await verdicts(page) == expected
        assert (
            "accepted" in expected and http.get("/v1/models/faces").json()["calibration"]["threshold_quantile"] == 0.9
        )

        score = outcomes[0]["js_score"]
        field = page.get_by_label("JS at most (nats)")
        for limit, verdict in ((score, "accepted"), (score * 0.999, "rejected")):
            await field.fill(str(limit))
            await field.press("Enter")
            await expect(page.locator(".pair").first).to_have_attribute("data-verdict", verdict)
            await expect(page).to_have_url(having(f"max_js={limit}"))
        await field.fill("")
        await field.press("Enter")
        await expect(page).to_have_url(having("max_quantile=0.9"))


async def test_a_link_shows_the_same_to_everyone(chromium: Browser, service: Service) -> None:
    link = f"{service.http}/?model=faces&seed=4294967290&count=12&view=label&max_quantile=0.5"
    async with opened(chromium, link) as page:
        # The seeds end before the count does.
        await expect(seeds_of(page)).to_have_text([f"Seed {seed}" for seed in range(4294967290, 2**32)])
        await expect(page.get_by_role("radio", name="Label")).to_be_checked()
        await expect(page.get_by_role("slider")).to_have_value("0.5")
        await expect(page.get_by_role("button", name="Next")).to_be_disabled()
        await expect(page).to_have_url(re.compile(f"^{re.escape(link)}$"))
        await page.get_by_role("button", name="Previous").click()
        await expect(seeds_of(page).first).to_have_text("Seed 4294967278")
        await expect(page).to_have_url(having("seed=4294967278"))
        await page.go_back()
        await expect(seeds_of(page).first).to_have_text("Seed 4294967290")


async def test_an_address_that_cannot_be_is_told(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/?model=cats&seed=-1&count=2&max_quantile=7") as page:
        notice = page.get_by_role("alert")
        await expect(notice).to_contain_text('asks for model "cats"; it must be one of faces')
        await expect(notice).to_contain_text('asks for seed "-1"')
        await expect(notice).to_contain_text('asks for max_quantile "7"')
        await expect(page.locator(READY)).to_have_count(2)
        field = page.get_by_label("First seed")
        await field.fill("1.5")
        await field.press("Enter")
        await expect(seeds_of(page).first).to_have_text("Seed 0")


async def test_the_pictures_are_the_samples(chromium: Browser, service: Service, http: httpx.Client) -> None:
    sample = http.get("/v1/models/faces/samples/3.npz", params={"include_rejected": True}).content
    with np.load(io.BytesIO(sample), allow_pickle=False) as arrays:
        label, js_map = arrays["label"], arrays["js_map"]
    classes = http.get("/v1/models/faces").json()["classes"]
    palette = np.array([[int(entry["rgb"][i : i + 2], 16) for i in (1, 3, 5)] for entry in classes], np.uint8)
    async with opened(chromium, f"{service.http}/?seed=3&count=1&view=label") as page:
        await expect(page.locator(READY)).to_have_count(1)
        picture = await drawn(page)
        scale = picture.shape[0] // label.shape[0]
        centre = slice(scale // 2, None, scale)
        assert np.array_equal(picture[centre, centre], palette[label])

        await page.get_by_role("button", name="hair").click()
        alone = (await drawn(page))[centre, centre]
        hair = label == [entry["name"] for entry in classes].index("hair")
        assert np.array_equal(alone[hair], palette[label][hair]) and not alone[~hair].any()
        await expect(page.get_by_role("button", name="hair")).to_have_attribute("aria-pressed", "true")

        await page.get_by_role("radio", name="Uncertainty").check()
        await expect(page.get_by_role("img", name="Uncertainty of each pixel of seed 3")).to_be_visible()
        await expect(page.locator(".pair[aria-busy=false]")).to_have_count(1)
        heat = (await drawn(page))[centre, centre].astype(int)
        assert np.abs(heat - heat_colours(js_map)).max() <= 1, "the colours of /uncertainty.png"


async def test_keyboard_alone(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/?count=3") as page:
        await expect(page.locator(READY)).to_have_count(3)
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the pairs")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("list", name="Pairs")).to_be_focused()
        assert await page.locator(READY).count() == 3, "a jump within the page loads nothing anew"
        await press_until(page, "Shift+Tab", ".skip")
        seen = []
        while True:
            await page.keyboard.press("Tab")
            outline = await page.evaluate(
                """() => {
                    const element = document.activeElement;
                    const shown = element.type === "radio" ? element.nextElementSibling : element;
                    return [element.id || element.textContent.trim(), getComputedStyle(shown).outlineStyle];
                }"""
            )
            if outline[0] == "max-js":
                break
            seen.append(outline)
        assert [name for name, _ in seen][:5] == ["API", "Metrics", "model", "seed", "count"]
        assert all(style != "none" for _, style in seen), "the focus must be seen"

        await press_until(page, "Shift+Tab", "#gate")
        await page.keyboard.press("Home")
        await expect(page.locator(".pair[data-verdict=rejected]")).to_have_count(3)
        await page.keyboard.press("End")
        await expect(page.locator(".pair[data-verdict=accepted]")).to_have_count(3)
        await expect(page).to_have_url(having("max_quantile=1"))
        await press_until(page, "Shift+Tab", "input[name=view]")
        await page.keyboard.press("ArrowRight")
        await expect(page.get_by_role("radio", name="Label")).to_be_checked()
        await expect(page).to_have_url(having("view=label"))
        await press_until(page, "Shift+Tab", "#next")
        await page.keyboard.press("Enter")
        await expect(seeds_of(page).first).to_have_text("Seed 3")
        await press_until(page, "Tab", ".legend button")
        await page.keyboard.press("Space")
        await expect(page.locator(".legend button").first).to_have_attribute("aria-pressed", "true")
        await expect(page.locator(".legend button").first).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["overlay", "uncertainty"])
async def test_accessibility_audit(chromium: Browser, service: Service, scheme: str, view: str) -> None:
    address = f"{service.http}/?count=4&view={view}&max_quantile=0.8&seed=nonsense"
    async with opened(chromium, address, scheme=scheme) as page:
        await expect(page.locator(READY)).to_have_count(4)
        await expect(page.get_by_role("alert")).to_be_visible()
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert len(found.response["passes"]) > 20


@pytest.mark.parametrize("pair", ["", "&pair=0&view=uncertainty"])
async def test_a_narrow_window_has_no_sideways_scroll(chromium: Browser, service: Service, pair: str) -> None:
    async with opened(chromium, f"{service.http}/?count=1&where=hair:0.01..{pair}", width=320, height=640) as page:
        await expect(page.locator(READY)).to_have_count(1)
        await expect(page.locator("dialog[open]")).to_have_count(1 if pair else 0)
        assert await page.evaluate("() => document.documentElement.scrollWidth") == 320
        body = "document.querySelector('.open-body')"
        assert await page.evaluate(f"() => {body}.scrollWidth <= {body}.clientWidth")


@pytest.mark.parametrize("width", [390, 1280])
async def test_nothing_moves_while_the_page_fills(chromium: Browser, service: Service, width: int) -> None:
    context = await chromium.new_context(viewport={"width": width, "height": 900})
    page = await context.new_page()
    await page.add_init_script(
        """window.moved = 0;
        new PerformanceObserver((list) => list.getEntries().forEach((entry) => { moved += entry.value; }))
            .observe({type: "layout-shift", buffered: true});"""
    )
    await page.goto(f"{service.http}/?count=4")
    await expect(page.locator(READY).first).to_be_visible(timeout=60_000)
    await page.wait_for_load_state("networkidle")
    assert await page.evaluate("moved") < 0.02, "the layout shift, of which 0.1 counts as good"
    await context.close()


async def test_keypoints_and_the_choice_of_a_model(chromium: Browser, service: Service, http: httpx.Client) -> None:
    model = http.get(f"/v1/models/{KEYPOINTS}").json()
    names = [entry["name"] for entry in model["keypoint_classes"]]
    sample = http.get(f"/v1/models/{KEYPOINTS}/samples/5?include_rejected=true").json()
    async with opened(chromium, f"{service.http}/?count=2&seed=5&max_js=3") as page:
        await page.get_by_label("Model").select_option(KEYPOINTS)
        await expect(page).to_have_url(having(f"model={KEYPOINTS}"))
        assert "seed=5" in page.url
        assert "max_js" not in page.url, "a score of one model says nothing of another's"
        await expect(page.locator(READY)).to_have_count(2)
        assert (await verdicts(page))[0] == ("accepted" if sample["accepted"] else "rejected")
        await expect(page.get_by_role("img", name="Keypoints over the image of seed 5")).to_be_visible()
        await expect(page.locator(".legend button")).to_have_text(names)
        await page.get_by_role("radio", name="Label").check()
        picture = await drawn(page)
        last = sample["keypoints"][-1]
        x, y = (int((last[axis] + 0.5) * picture.shape[0] / sample["image"]["width"]) for axis in "xy")
        colour = "#{:02x}{:02x}{:02x}".format(*picture[y, x])
        assert colour == model["keypoint_classes"][-1]["rgb"], "the last keypoint lies on top"


async def test_a_model_without_calibration(chromium: Browser, uncalibrated: Service) -> None:
    async with opened(chromium, f"{uncalibrated.http}/?model={KEYPOINTS}&count=2") as page:
        await expect(page.locator(READY)).to_have_count(2)
        assert await verdicts(page) == ["not judged"] * 2 and "max_" not in page.url
        await expect(page.get_by_role("slider")).to_be_hidden()
        await expect(page.get_by_role("status")).to_contain_text("is not calibrated: give a JS score")
        path = f"/v1/models/{KEYPOINTS}/samples/0?max_js=1e9"
        score = httpx.get(uncalibrated.http + path, timeout=60.0).json()["js_score"]
        await page.get_by_label("JS at most (nats)").fill(str(score))
        await page.get_by_label("JS at most (nats)").press("Enter")
        await expect(page.locator(".pair").first).to_have_attribute("data-verdict", "accepted")
        await page.get_by_label("Model").select_option("faces")
        await expect(page.get_by_role("slider")).to_have_value("0.9")


async def test_a_service_that_goes_and_comes_back(chromium: Browser, tmp_path: Path) -> None:
    running = start_service(tmp_path / "serve.log")
    try:
        async with opened(chromium, f"{running.http}/?count=1") as page:
            await expect(page.locator(READY)).to_have_count(1)
            assert running.stop() == 0
            await page.get_by_role("button", name="Next").click()
            await expect(page.get_by_role("alert")).to_contain_text("The service does not answer. Trying again in")
            running = start_service(tmp_path / "again.log", "--http-port", str(urlsplit(running.http).port))
            # Nobody clicks: by now the page may have gone on by itself.
            await expect(page.locator(READY)).to_have_count(1)
            await expect(page.get_by_role("alert")).to_be_hidden()
    finally:
        running.process.terminate()
        running.process.wait(60)


async def test_a_busy_service_is_left_the_time_it_asks_for(chromium: Browser, service: Service) -> None:
    """The answers are made here: a full service cannot be had at will."""
    async with opened(chromium, f"{service.http}/?count=1") as page:
        await expect(page.locator(READY)).to_have_count(1)
        refused = []

        async def refuse(route: Route) -> None:
            refused.append(route.request.url)
            answer = {"status": 429, "headers": {"Retry-After": "1000"}, "json": {"detail": "128 are in flight."}}
            await (route.fulfill(**answer) if len(refused) <= 1 else route.continue_())

        await page.route("**/samples/*", refuse)
        await page.get_by_role("spinbutton", name="Pairs").fill("2")
        await page.get_by_role("spinbutton", name="Pairs").press("Enter")
        notice = page.get_by_role("alert")
        await expect(notice).to_have_text(re.compile("The service is busy. 128 are in flight. Trying again in 1000 s."))
        asked = len(refused)
        await page.wait_for_timeout(3000)
        assert len(refused) == asked, "nothing is asked while the service wants a pause"
        await page.get_by_role("button", name="Try again now").click()
        await expect(page.locator(READY)).to_have_count(2)
        await expect(notice).to_be_hidden()


async def test_one_pair_that_fails_is_told_at_its_place(chromium: Browser, service: Service) -> None:
    """The answer is made here: the demo's model does not fail at will."""
    async with opened(chromium, f"{service.http}/?count=1") as page:
        await expect(page.locator(READY)).to_have_count(1)
        broken = {"status": 502, "json": {"detail": "Triton failed to run the model"}}
        await page.route("**/samples/2?*", lambda route: route.fulfill(**broken))
        await page.get_by_role("spinbutton", name="Pairs").fill("3")
        await page.get_by_role("spinbutton", name="Pairs").press("Enter")
        await expect(page.locator(READY)).to_have_count(2)
        await expect(page.locator(".failure:visible")).to_contain_text("Triton failed to run the model")
        await page.unroute("**/samples/2?*")
        await page.get_by_role("button", name="Try again").click()
        await expect(page.locator(READY)).to_have_count(3)


async def test_a_token_is_asked_for_and_kept_in_the_tab(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/metrics") as page:
        tokens = []

        async def guard(route: Route) -> None:
            tokens.append(route.request.headers.get("authorization"))
            await (route.continue_() if tokens[-1] == "Bearer right" else route.fulfill(status=401, json={}))

        await page.route("**/v1/**", guard)
        await page.goto(f"{service.http}/?count=2")
        notice = page.get_by_role("alert")
        await expect(notice).to_contain_text("The service asks for an access token.")
        await expect(page.get_by_label("Access token")).to_be_focused()
        assert tokens == [None]
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await expect(notice).to_contain_text("did not accept this access token")
        await page.keyboard.type("right")
        await page.keyboard.press("Enter")
        await expect(page.locator(READY)).to_have_count(2)
        await expect(notice).to_be_hidden()
        assert "right" not in page.url
        assert await page.evaluate("() => [localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
