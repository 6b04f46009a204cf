"""The gallery's choice of pairs by content and by class of the generator, in a real headless Chromium."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import httpx
import pytest
from playwright.async_api import Browser, Page, Route, expect

from tests.conftest import Service
from tests.support.browser import READY, having, opened, seeds_of, verdicts

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.browser]

KEYPOINTS = "faces_keypoints"
GLASSES = "where=glasses%3A0.01.."


def satisfying(http: httpx.Client, where: list[str], model: str = "faces", end: int = 40) -> list[dict[str, Any]]:
    """The samples of the seeds below `end` that satisfy conditions."""
    body = {"seeds": list(range(end)), "where": where, "include_rejected": True}
    outcomes = http.post(f"/v1/models/{model}/samples:batchGet", json=body).json()["outcomes"]
    return [outcome for outcome in outcomes if not outcome.get("filtered")]


async def add(page: Page, name: str, *, least: str = "", most: str = "") -> None:
    await page.get_by_label("Only pairs with").select_option(name)
    await page.get_by_label(re.compile("^At least")).fill(least)
    await page.get_by_label(re.compile("^At most")).fill(most)
    await page.get_by_role("button", name="Add", exact=True).click()


def numbers(samples: list[dict[str, Any]]) -> list[str]:
    return [f"Seed {sample['seed']}" for sample in samples]


async def test_conditions_choose_the_pairs(chromium: Browser, service: Service, http: httpx.Client) -> None:
    found = satisfying(http, ["glasses:0.01.."])[:3]
    last, accepted = found[-1]["seed"], sum(sample["accepted"] for sample in found)
    async with opened(chromium, f"{service.http}/?count=3") as page:
        await expect(page.locator(READY)).to_have_count(3)
        await add(page, "glasses", least="1")
        await expect(page).to_have_url(having(GLASSES))
        await expect(page.locator(READY)).to_have_count(3)
        await expect(seeds_of(page)).to_have_text(numbers(found))
        assert await verdicts(page) == ["accepted" if sample["accepted"] else "rejected" for sample in found]
        summary = page.get_by_role("status")
        await expect(summary).to_contain_text(f"Seeds 0 to {last}. {accepted} accepted, {3 - accepted} rejected")
        await expect(summary).to_contain_text(f"{last - 2} filtered by the conditions.")

        await page.get_by_role("slider").press("Home")
        await expect(summary).to_contain_text(f"0 accepted, 3 rejected at JS ≤ 34.76 nats. {last - 2} filtered")

        await expect(page.get_by_role("button", name="Previous")).to_be_disabled()
        await page.get_by_role("button", name="Next").click()
        await expect(page).to_have_url(having(f"seed={last + 1}"))
        await page.get_by_role("button", name="Previous").click()
        await expect(seeds_of(page)).to_have_text(numbers(found))
        await expect(page).to_have_url(having("seed=0"))


async def test_several_conditions_are_chips_that_can_go(
    chromium: Browser, service: Service, http: httpx.Client
) -> None:
    both = satisfying(http, ["glasses:0.01..", "beard:..0"])[:2]
    glasses = satisfying(http, ["glasses:0.01.."])[:2]
    assert both != glasses
    async with opened(chromium, f"{service.http}/?count=2&{GLASSES}&where=beard%3A..0") as page:
        chips = page.get_by_role("list", name="Conditions in force").get_by_role("button")
        await expect(chips).to_have_text(["glasses ≥ 1 %×", "beard ≤ 0 %×"])
        await expect(seeds_of(page)).to_have_text(numbers(both))
        await page.get_by_role("button", name="Remove the condition beard ≤ 0 %").press("Enter")
        await expect(chips).to_have_text(["glasses ≥ 1 %×"])
        await expect(chips).to_be_focused()
        await expect(seeds_of(page)).to_have_text(numbers(glasses))
        assert "beard" not in page.url
        await add(page, "glasses", least="0.5", most="0.9")  # another condition for the name replaces the first
        await expect(chips).to_have_text(["glasses 0.5 % to 0.9 %×"])
        await expect(page).to_have_url(having("where=glasses%3A0.005..0.009"))
        await page.go_back()
        await expect(chips).to_have_text(["glasses ≥ 1 %×"])
        await chips.click()
        await expect(seeds_of(page)).to_have_text(["Seed 0", "Seed 1"])
        await expect(page.get_by_label("Only pairs with")).to_be_focused()
        await add(page, "hat")  # no bound is no condition
        assert "where" not in page.url


async def test_a_condition_on_a_keypoint(chromium: Browser, service: Service, http: httpx.Client) -> None:
    async with opened(chromium, f"{service.http}/?count=2&{GLASSES}") as page:
        await page.get_by_label("Model").select_option(KEYPOINTS)
        await expect(page).to_have_url(having(f"model={KEYPOINTS}"))
        assert "where" not in page.url, "conditions of one model say nothing of another's"
        await add(page, "left_ear_tip", most="0.4")
        await expect(page).to_have_url(having("where=left_ear_tip%3A..0.4"))
        found = satisfying(http, ["left_ear_tip:..0.4"], KEYPOINTS)[:2]
        await expect(seeds_of(page)).to_have_text(numbers(found))


@pytest.mark.parametrize(("where", "error"), [("wings:0.1..", "has no such name"), ("hair", "is not a condition")])
async def test_a_condition_that_cannot_be_is_told(
    chromium: Browser, service: Service, http: httpx.Client, where: str, error: str
) -> None:
    detail = http.get("/v1/models/faces/samples/0", params={"where": where}).json()["detail"]
    assert error in detail
    async with opened(chromium, f"{service.http}/?count=2&where={where}") as page:
        await expect(page.locator("#ended-text")).to_have_text(detail)
        await expect(page.locator(".pair")).to_have_count(0)
        await page.get_by_role("button", name="Remove the condition").click()
        await expect(page.locator(READY)).to_have_count(2)
        await expect(page.locator("#ended-text")).to_have_text("")


async def test_a_search_without_end_stops_and_goes_on(chromium: Browser, service: Service, http: httpx.Client) -> None:
    """The answers of the first seeds are made here: hundreds of real ones take long."""
    asked: list[int] = []

    async def nothing(route: Route) -> None:
        seeds = json.loads(route.request.post_data or "")["seeds"]
        asked.extend(seeds)
        outcomes = [{"seed": seed, "filtered": True, "content": {"glasses": 0}} for seed in seeds]
        await (route.fulfill(json={"outcomes": outcomes}) if seeds[0] < 256 else route.continue_())

    async with opened(chromium, f"{service.http}/?count=1&max_quantile=0.5") as page:
        await expect(page.locator(READY)).to_have_count(1)
        await page.route("**/samples:batchGet", nothing)
        await add(page, "glasses", least="1")
        await expect(page.locator("#ended-text")).to_contain_text("None of 256 seeds in a row satisfies the conditions")
        await expect(page.locator(".pair")).to_have_count(0)
        await expect(page.get_by_role("status")).to_contain_text("256 filtered by the conditions.")
        assert asked == list(range(256)), "each seed once, in order, and no more than that"
        await page.get_by_role("button", name="Go on at seed 256").click()
        await expect(page.locator(READY)).to_have_count(1)
        await expect(page).to_have_url(having("seed=256"))
        await expect(page.locator("#go-on")).to_be_hidden()


async def test_the_end_of_the_seeds_ends_a_search(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/?seed=4294967290&where=hat:0.9..") as page:
        await expect(page.locator("#ended-text")).to_have_text("There are no more seeds.")
        await expect(page.locator("#go-on")).to_be_hidden()
        await expect(page.get_by_role("button", name="Next")).to_be_disabled()


# ---- Classes of the generator ---------------------------------------------------------------------------------------


class Classes:
    """Gives `faces` a generator of two classes, for a page: the real service draws the same for both.

    The threshold of class 1 is half of that of class 0. `asked` has the class of each request for samples.
    """

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def __call__(self, route: Route) -> None:
        url = urlsplit(route.request.url)
        query = parse_qs(url.query)
        index = query.pop("class_index", [None])[0]
        kept = "&".join(f"{name}={value}" for name, values in query.items() for value in values)
        plain = urlunsplit(url._replace(query=kept))
        if "/samples" not in url.path:
            answer = await route.fetch(url=plain)
            body = await answer.json()
            for model in body.get("models", [body]):
                if model["name"] == "faces":
                    self._divide(model, index)
            await route.fulfill(json=body)
        elif route.request.method == "POST":
            body = json.loads(route.request.post_data or "")
            self.asked.append(body.pop("class_index", None))
            await route.continue_(url=plain, post_data=json.dumps(body))
        else:
            self.asked.append(index)
            await route.continue_(url=plain)

    def _divide(self, model: dict[str, Any], index: str | None) -> None:
        model["generator_classes"], model["calibrated_classes"] = ["young", "old"], [0, 1]
        if index is None:
            model["calibration"] = None
        elif index == "1":
            model["calibration"]["quantiles"] = [score / 2 for score in model["calibration"]["quantiles"]]


async def test_a_class_of_the_generator(chromium: Browser, service: Service, http: httpx.Client) -> None:
    threshold = http.get("/v1/models/faces").json()["calibration"]["quantiles"][90]
    classes = Classes()
    async with opened(chromium, f"{service.http}/metrics") as page:
        await page.route("**/v1/models**", classes)
        await page.goto(f"{service.http}/?count=2")
        await expect(page.locator(READY)).to_have_count(2)
        choice = page.get_by_label("Class")
        await expect(choice.locator("option")).to_have_text(["young", "old"])
        await expect(page.get_by_role("status")).to_contain_text(f"JS ≤ {threshold:.4g} nats")
        await expect(page.locator(".legend button")).to_have_count(16)
        await expect(page).to_have_url(having("class_index=0"))
        assert set(classes.asked) == {"0"}

        classes.asked.clear()
        await choice.select_option("old")
        await expect(page).to_have_url(having("class_index=1"))
        await expect(page.get_by_role("status")).to_contain_text(f"JS ≤ {threshold / 2:.4g} nats")
        await expect(page.locator(READY)).to_have_count(2)
        await page.get_by_role("link", name="Seed 1").click()
        await expect(page.locator("#facts")).to_contain_text("Classold")
        json_link = page.get_by_role("dialog").get_by_role("link", name="json")
        await expect(json_link).to_have_attribute("href", re.compile("class_index=1"))
        await expect(json_link).to_have_attribute("download", "faces-class-1-1.json")
        await page.keyboard.press("Escape")
        await add(page, "glasses", least="1")
        await expect(page.locator(READY)).to_have_count(2)
        await expect(choice).to_have_value("1")
        assert set(classes.asked) == {"1", 1}

        await page.get_by_label("Model").select_option(KEYPOINTS)
        await expect(page.locator(READY)).to_have_count(2)
        await expect(page.locator("#class-field")).to_be_hidden()
        assert "class_index" not in page.url
        assert classes.asked[-1] is None


async def test_a_class_that_cannot_be_is_told(chromium: Browser, service: Service) -> None:
    async with opened(chromium, f"{service.http}/?count=1&class_index=1") as page:
        await expect(page.locator(READY)).to_have_count(1)
        await expect(page.get_by_role("alert")).to_contain_text("left out, because faces has no classes to draw")
        await page.route("**/v1/models**", Classes())
        await page.goto(f"{service.http}/?count=1&class_index=2")
        await expect(page.get_by_role("alert")).to_contain_text(
            'class_index "2"; it must be a whole number from 0 to 1'
        )
