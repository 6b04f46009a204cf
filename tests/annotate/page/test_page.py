"""The annotation page in a real headless Chromium: a whole small session, and its looks."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from labelmint.annotate.strokes import UNDRAWN
from labelmint.models.annotations import read_keypoints, read_masks
from tests.annotate.page.conftest import Desk
from tests.conftest import ROOT
from tests.support import browser

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.browser, pytest.mark.minutes]

DEMO = ROOT / "benchmarks" / "demo" / "weights" / "generator.safetensors"
SIDE = 16  # of the small generator's images


@asynccontextmanager
async def opened(chromium: Browser, address: str, **looks: Any) -> AsyncIterator[Page]:
    """The page once an image is open."""
    async with browser.opened(chromium, address, **looks) as page:
        await expect(page.locator("#images button[aria-current]")).to_have_count(1)
        yield page


async def spot(page: Page, x: float, y: float, side: int = SIDE) -> tuple[float, float]:
    """The place on the screen of a pixel of the image, as the page shows the whole of it."""
    box = await page.locator("#canvas").bounding_box()
    assert box is not None
    shown = 0.98 * min(box["width"], box["height"])
    left, top = box["x"] + (box["width"] - shown) / 2, box["y"] + (box["height"] - shown) / 2
    return left + (x + 0.5) * shown / side, top + (y + 0.5) * shown / side


async def drag(page: Page, *points: tuple[float, float], side: int = SIDE) -> None:
    await page.mouse.move(*await spot(page, *points[0], side))
    await page.mouse.down()
    for point in points[1:] or points:
        await page.mouse.move(*await spot(page, *point, side), steps=5)
    await page.mouse.up()


async def add_class(page: Page, name: str) -> None:
    await page.fill("#new-name", name)
    await page.press("#new-name", "Enter")
    await expect(page.locator("#classes button[aria-pressed=true]")).to_have_text(name)


async def saved(page: Page) -> None:
    await expect(page.locator("#saved")).to_have_text("Saved")


def masks(desk: Desk) -> dict[int, np.ndarray]:
    return dict(read_masks(desk.directory).labels)


async def test_a_whole_session(
    chromium: Browser, small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    desk = start_desk(small_generator, tmp_path / "session")
    async with opened(chromium, desk.address) as page:
        # Draw two classes; the prediction follows.
        await add_class(page, "bright")
        await page.locator("#classes button").nth(0).click()
        await drag(page, (1, 1), (1, 14))
        await page.locator("#classes button").nth(1).click()
        await drag(page, (8, 3), (13, 3))
        await expect(page.locator("#others figure")).to_have_count(6)
        await saved(page)
        (first,) = masks(desk)
        mask = masks(desk)[first]
        assert mask[7, 1] == 0 and mask[3, 10] == 1 and mask[14, 14] == UNDRAWN

        # Undo and redo are saved, and so is a reload in the middle.
        await page.click("#undo")
        await expect(page.locator("#redo")).to_be_enabled()
        await saved(page)
        await page.reload()
        await expect(page.locator("#images button[aria-current]")).to_have_count(1)
        with pytest.raises(Exception, match="drawn in no image"):
            masks(desk)
        await page.locator("#classes button").nth(1).click()
        await drag(page, (8, 4), (13, 4))
        await page.keyboard.press("Control+z")
        await page.keyboard.press("Control+Shift+Z")
        await saved(page)
        assert masks(desk)[first][4, 10] == 1

        # A polygon, closed by Enter; the eraser; a fill of what is predicted.
        await page.check("input[value=polygon]")
        for x, y in ((9, 9), (14, 9), (14, 13)):
            await page.mouse.click(*await spot(page, x, y))
        await page.keyboard.press("Enter")
        await saved(page)
        assert masks(desk)[first][10, 13] == 1
        await page.keyboard.press("e")
        await drag(page, (13, 10))
        await saved(page)
        assert masks(desk)[first][10, 13] == UNDRAWN
        await expect(page.locator("#preview-said")).to_contain_text("drawn pixels")
        before = (masks(desk)[first] != UNDRAWN).sum()
        await page.keyboard.press("f")
        await page.mouse.click(*await spot(page, 13, 10))
        await expect(page.locator("#images small")).not_to_have_text(f"{round(100 * before / SIDE**2)} %")
        await saved(page)
        assert masks(desk)[first][10, 13] == 1 and (masks(desk)[first] != UNDRAWN).sum() > before

        # Accept a suggestion and skip another.
        skipped = (await page.locator("#others figcaption").nth(1).inner_text()).split(":")[0]
        await page.locator("#others button", has_text="Skip").nth(1).click()
        await expect(page.locator("#others figcaption", has_text=skipped)).to_have_count(0)
        await page.locator("#others button", has_text="Draw").nth(0).click()
        await expect(page.locator("#images button")).to_have_count(2)
        await page.keyboard.press("b")
        for number, row in ((0, 2), (1, 12)):
            await page.locator("#classes button").nth(number).click()
            await drag(page, (2, row), (13, row))
        await saved(page)
        assert len(masks(desk)) == 2

        # Is it enough? Then serve it, and ask the service for a pair.
        await page.locator("#enough summary").click()
        await page.click("#estimate")
        await expect(page.locator("#estimated svg")).to_have_count(1)
        await page.locator("#serve summary").click()
        for name, value in (("steps", "40"), ("heads", "2"), ("seeds", "1000")):
            await page.fill(f"#job input[name={name}]", value)
        await page.click("#commands")
        await expect(page.locator("#command-lines")).to_contain_text("labelmint calibrate")
        await page.click("#start")
        link = page.locator("#job-said a")
        await expect(link).to_have_count(1, timeout=300_000)
        url = await link.get_attribute("href")
        answer = httpx.get(f"{url}/v1/models/mine/samples/7?include_rejected=true", timeout=60)
        assert answer.status_code == 200
        assert [each["name"] for each in httpx.get(f"{url}/v1/models/mine").json()["classes"]] == [
            "background",
            "bright",
        ]
        await page.click("#cancel")
        await expect(page.locator("#job-said")).to_have_text("Cancelled.")


async def test_a_second_tab_overwrites_nothing_and_an_ended_program_loses_nothing(
    chromium: Browser, small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    desk = start_desk(small_generator, tmp_path / "tabs", "--port", "0")
    async with opened(chromium, desk.address) as one, opened(chromium, desk.address) as other:
        await drag(one, (3, 3), (9, 3))
        await saved(one)
        await drag(other, (3, 12), (9, 12))
        await expect(other.locator("#trouble")).to_contain_text("another tab")
        await expect(other.locator("#saved")).to_have_text("Changed elsewhere")
        await other.reload()
        await expect(other.locator("#images small")).not_to_have_text("0 %")
        assert [mask[3, 5] for mask in masks(desk).values()] == [0]
        assert [mask[12, 5] for mask in masks(desk).values()] == [UNDRAWN]

        port = re.search(r":(\d+)/", desk.address)
        assert port is not None
        desk.process.kill()
        desk.process.wait()
        await drag(one, (3, 8), (9, 8))
        await expect(one.locator("#trouble")).to_contain_text("does not answer")
        await expect(one.locator("#saved")).to_have_text("Not saved")


async def test_what_a_full_disk_refuses_is_saved_when_there_is_room(
    chromium: Browser, small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    desk = start_desk(small_generator, tmp_path / "full")
    async with opened(chromium, desk.address) as page:
        await drag(page, (3, 3), (9, 3))
        await saved(page)
        await page.click("#next")
        thumbnails = page.locator("#images button")
        await expect(thumbnails).to_have_count(2)
        await expect(thumbnails.nth(1)).to_have_attribute("aria-current", "true")
        with desk.full_disk():
            await drag(page, (3, 12), (9, 12))
            await expect(page.locator("#saved")).to_have_text("Not saved")
            await expect(page.locator("#trouble")).to_contain_text("make room")
            await thumbnails.nth(0).click()
            await page.click("#next")
            await expect(page.locator("#next")).to_be_enabled()
            await expect(thumbnails.nth(1)).to_have_attribute("aria-current", "true")
            assert [mask[12, 5] for mask in masks(desk).values()] == [UNDRAWN]
        await saved(page)
        await expect(page.locator("#trouble")).to_be_hidden()
        assert [mask[12, 5] for mask in masks(desk).values()] == [UNDRAWN, 0]
        await thumbnails.nth(0).click()
        await expect(thumbnails.nth(0)).to_have_attribute("aria-current", "true")


async def test_names_colours_and_keys(
    chromium: Browser, small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    desk = start_desk(small_generator, tmp_path / "names")
    async with opened(chromium, desk.address) as page:
        await add_class(page, "ear")
        await page.locator("#classes button").nth(1).press("F2")
        await page.keyboard.press("Control+a")
        await page.keyboard.type("left ear")
        await page.keyboard.press("Enter")
        await expect(page.locator("#classes button").nth(1)).to_have_text("left ear")
        await page.fill("#new-name", "left ear")
        await page.press("#new-name", "Enter")
        await expect(page.locator("#trouble")).to_contain_text("twice")
        await page.focus("#canvas")
        await page.keyboard.press("1")
        await expect(page.locator("#classes button").nth(0)).to_have_attribute("aria-pressed", "true")
        radius = float(await page.input_value("#radius"))
        await page.keyboard.press("]")
        assert float(await page.input_value("#radius")) > radius
        for key, tool in (("e", "erase"), ("p", "polygon"), ("f", "fill"), ("h", "pan"), ("b", "brush")):
            await page.keyboard.press(key)
            await expect(page.locator(f"input[value={tool}]")).to_be_checked()
    names = httpx.get(f"{desk.address}api/session").json()["classes"]
    assert [each["name"] for each in names] == ["background", "left ear"]


async def test_zoom_and_pan_keep_the_pixel_under_the_pointer(
    chromium: Browser, small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    desk = start_desk(small_generator, tmp_path / "zoom")
    async with opened(chromium, desk.address) as page:
        await page.locator("#radius").fill("0.5")
        at = await spot(page, 11, 4)
        await page.mouse.move(*at)
        await page.mouse.wheel(0, -600)
        await page.mouse.down()
        await page.mouse.up()
        await page.check("input[value=pan]")
        await page.mouse.move(*at)
        await page.mouse.down()
        await page.mouse.move(at[0] - 60, at[1] + 40, steps=3)
        await page.mouse.up()
        await page.check("input[value=erase]")
        await page.mouse.click(at[0] - 60, at[1] + 40)
        await saved(page)
        strokes = httpx.get(f"{desk.address}api/images/4000000000/strokes").json()["strokes"]
        assert [each["tool"] for each in strokes] == ["brush", "erase"]
        for each in strokes:
            assert np.allclose(each["points"][0], (11, 4), atol=0.15), (
                "zooming and moving keep the image under the pointer"
            )


async def test_two_fingers_move_and_one_draws(
    chromium: Browser, small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    desk = start_desk(small_generator, tmp_path / "touch")
    async with opened(chromium, desk.address, width=1024, height=768, touch=True) as page:
        session = await page.context.new_cdp_session(page)

        async def touch(kind: str, *points: tuple[float, float]) -> None:
            shown = [
                dict(zip("xy", await spot(page, *point), strict=True)) | {"id": n} for n, point in enumerate(points)
            ]
            await session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": shown})

        await touch("touchStart", (3, 3))
        await touch("touchMove", (8, 3))
        await touch("touchEnd")
        await saved(page)
        await touch("touchStart", (3, 12))
        await touch("touchStart", (3, 12), (9, 12))
        await touch("touchMove", (1, 12), (12, 12))
        await touch("touchEnd")
        await page.wait_for_timeout(300)
        strokes = httpx.get(f"{desk.address}api/images/4000000000/strokes").json()["strokes"]
        assert len(strokes) == 1 and len(strokes[0]["points"]) > 1, "the pinch has drawn nothing"


async def test_keypoints_are_placed_dragged_hidden_and_absent(
    chromium: Browser, small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    desk = start_desk(small_generator, tmp_path / "points", "--task", "keypoints")
    async with opened(chromium, desk.address) as page:
        for name in ("nose", "eye", "mouth"):
            await add_class(page, name)
        await page.focus("#canvas")
        await page.keyboard.press("1")
        await page.mouse.click(*await spot(page, 4, 5))
        await page.keyboard.press("2")
        await page.mouse.click(*await spot(page, 12, 5))
        await drag(page, (12, 5), (11, 9))
        await page.keyboard.press("x")
        await page.keyboard.press("3")
        await page.keyboard.press("Delete")
        await saved(page)
        points = httpx.get(f"{desk.address}api/images/4000000000/points").json()["points"]
        assert [(each["name"], each["visible"]) for each in points] == [("nose", 2), ("eye", 1), ("mouth", 0)]
        (label,) = read_keypoints_but_mouth(desk)
        assert np.allclose(label[0], (4, 5, 2), atol=0.2) and np.allclose(label[1], (11, 9, 1), atol=0.2)


def read_keypoints_but_mouth(desk: Desk) -> list[np.ndarray]:
    """`fit` refuses a keypoint that no image shows, so it is taken from the names first."""
    names = desk.directory / "keypoints.json"
    names.write_text(re.sub(r",\s*\{\s*\"name\": \"mouth\".*?\}", "", names.read_text(), flags=re.DOTALL))
    rows = desk.directory / "keypoints.csv"
    rows.write_text("".join(line for line in rows.read_text().splitlines(True) if "mouth" not in line))
    return list(read_keypoints(desk.directory).labels.values())


LOOKS = [(1024, 768, "light"), (1366, 768, "dark"), (1920, 1080, "light"), (3840, 2160, "dark"), (820, 1180, "light")]


@pytest.mark.parametrize(("width", "height", "scheme"), LOOKS)
async def test_the_page_looks_right_and_is_accessible(
    chromium: Browser, demo_desk: Desk, width: int, height: int, scheme: str
) -> None:
    async with opened(chromium, demo_desk.address, width=width, height=height, scheme=scheme) as page:
        await expect(page.locator("#others figure")).to_have_count(6)
        found = await Axe().run(page)
        assert not found.response["violations"], found.generate_report()
        wide = await page.evaluate_handle("document.documentElement")
        scrolls = await wide.get_property("scrollWidth")
        assert await scrolls.json_value() <= width, "nothing is cut off on the right"
        for name in ("#tools", "#canvas", "#classes", "#others", "#serve"):
            box = await page.locator(name).bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width, name
        pictures = ROOT / "build" / "annotate-page"
        pictures.mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=pictures / f"{width}-{scheme}.png")


@pytest.fixture(scope="module")
def demo_desk(tmp_path_factory: pytest.TempPathFactory, start_desk: Callable[..., Desk]) -> Desk:
    """The demo's generator with a few strokes on one image."""
    desk = start_desk(DEMO, tmp_path_factory.mktemp("looks") / "drawings")
    with httpx.Client(base_url=f"{desk.address}api/", timeout=120) as api:
        classes = {"background": (0, 0, 0), "skin": (230, 159, 0), "hat": (86, 180, 233)}
        api.put("classes", json={"classes": [{"name": name, "rgb": rgb} for name, rgb in classes.items()]})
        api.post("images", json={"seed": 4_000_000_000})
        lines = {0: ((6, 20), (6, 90)), 1: ((55, 72), (78, 78)), 2: ((45, 40), (80, 40))}
        strokes = [{"tool": "brush", "class": each, "radius": 3, "points": points} for each, points in lines.items()]
        api.put("images/4000000000/strokes", json={"revision": 0, "strokes": strokes}).raise_for_status()
    return desk
