"""The server of the annotation page, over real sockets."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from labelmint.annotate.strokes import area_of
from labelmint.models.annotations import read_keypoints, read_masks
from labelmint.models.annotations.coco import keypoints_path
from tests.annotate.page.conftest import ADDRESS, Desk
from tests.conftest import ROOT
from tests.support.processes import alive, descendants
from tests.support.waiting import wait_for

pytestmark = pytest.mark.torch

CLASSES = {"classes": [{"name": name, "rgb": [10 * n, 0, 0]} for n, name in enumerate(("background", "eye", "hair"))]}


def brush(class_id: int, *points: tuple[float, float], radius: float = 2) -> dict[str, object]:
    return {"tool": "brush", "class": class_id, "radius": radius, "points": points}


STROKES = [brush(0, (1, 1), (1, 14)), brush(1, (8, 4), (12, 4)), brush(2, (8, 12))]


@pytest.fixture(scope="module")
def desk(small_generator: Path, tmp_path_factory: pytest.TempPathFactory, start_desk: Callable[..., Desk]) -> Desk:
    """One page for most tests, each of which draws on seeds of its own."""
    return start_desk(small_generator, tmp_path_factory.mktemp("app") / "drawings")


@pytest.fixture
def api(desk: Desk) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{desk.address}api/", timeout=60) as client:
        yield client


def problem(answer: httpx.Response) -> tuple[int, str, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["reason"], answer.json()["detail"]


def draw(api: httpx.Client, seed: int) -> None:
    assert api.put("classes", json=CLASSES).status_code == 200
    if api.post("images", json={"seed": seed}).json()["revision"] > 0:
        return
    saved = api.put(f"images/{seed}/strokes", json={"revision": 0, "strokes": STROKES}).json()
    assert saved["revision"] == 1 and saved["classes"] == [0, 1, 2] and 0 < saved["drawn"] < 1


def test_draw_look_fill_and_save(api: httpx.Client, desk: Desk) -> None:
    draw(api, 5)
    preview = api.post("preview", json={"seed": 5, "others": [6, 7]}).json()
    assert [each["seed"] for each in preview["images"]] == [5, 6, 7] and preview["pixels"] > 40
    at = f"preview/{preview['preview']}"
    label = np.asarray(Image.open(io.BytesIO(api.get(f"{at}/5/label.png").content)))
    mask = np.asarray(Image.open(io.BytesIO(api.get("images/5/mask.png").content)))
    drawn = mask[..., 3] > 0
    assert (label[drawn] == mask[drawn]).all(axis=1).mean() > 0.8, "it learned what is drawn"
    assert Image.open(io.BytesIO(api.get(f"{at}/7/uncertainty.png").content)).size == (16, 16)
    found = api.post("images/5/region", json={"preview": preview["preview"], "at": [8.2, 12.1]}).json()
    region = area_of(found["region"], 16)
    assert region[12, 8] and (label[region] == label[12, 8]).all()
    fill = {"tool": "fill", "class": 2, "at": [8.2, 12.1], "region": found["region"]}
    saved = api.put("images/5/strokes", json={"revision": 1, "strokes": [*STROKES, fill]}).json()
    assert saved["revision"] == 2
    assert (read_masks(desk.directory).labels[5][region] == 2).all()


def test_the_same_drawing_gives_the_same_prediction(
    small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]
) -> None:
    asked = {"seed": 5, "others": [9, 6]}

    def pictures(client: httpx.Client) -> list[bytes]:
        number = client.post("preview", json=asked).json()["preview"]
        paths = [f"preview/{number}/{seed}/{name}.png" for seed in (5, 9, 6) for name in ("label", "uncertainty")]
        return [client.get(path).content for path in paths]

    desk = start_desk(small_generator, tmp_path / "drawings")
    with httpx.Client(base_url=f"{desk.address}api/", timeout=60) as client:
        draw(client, 5)
        assert problem(client.get("estimate"))[:2] == (409, "TOO_FEW")
        before = pictures(client)
        assert pictures(client) == before
    assert desk.stop() == 0
    again = start_desk(small_generator, desk.directory)
    with httpx.Client(base_url=f"{again.address}api/", timeout=60) as client:
        assert client.get("images/5/strokes").json()["strokes"][1]["points"] == [[8, 4], [12, 4]]
        assert pictures(client) == before


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("PUT", "images/8/strokes", {"revision": 0, "strokes": []}, 409, "another tab"),
        ("PUT", "images/99/strokes", {"revision": 0, "strokes": []}, 400, "not open"),
        ("PUT", "images/8/strokes", {"revision": 1, "strokes": [brush(9, (1, 1))]}, 400, "class 9"),
        ("PUT", "images/8/strokes", {"revision": 1, "strokes": [{"tool": "x"}]}, 400, "strokes.0"),
        ("PUT", "images/8/strokes", {"revision": 1, "strokes": [], "more": 1}, 400, "more"),
        ("POST", "images/8/skip", None, 400, "something is drawn"),
        ("POST", "images/8/region", {"preview": 99, "at": [1, 1]}, 400, "no prediction 99"),
        ("POST", "images", {"seed": -1}, 400, "seed"),
        ("PUT", "classes", {"classes": []}, 400, "is drawn on seed"),
        ("POST", "serve", {"model": "../x"}, 400, "model"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    api: httpx.Client, method: str, path: str, body: object, status: int, said: str
) -> None:
    draw(api, 8)
    found = problem(api.request(method, path, json=body))
    assert found[0] == status and said in f"{found[2]}", found


def test_the_estimate_and_the_suggestions(api: httpx.Client) -> None:
    for seed in (20, 21):
        draw(api, seed)
    found = api.get("estimate").json()
    assert found["curve"][0]["images"] == 2 and 0 <= found["curve"][0]["miou"] <= 1
    assert [each["name"] for each in found["classes"]] == ["background", "eye", "hair"]
    assert "would gain most" in found["advice"]
    assert "--unlabelled extend" in api.post("commands", json={}).json()["commands"][0]
    first = api.get("suggestions", params={"count": 3}).json()
    assert len({each["seed"] for each in first}) == 3 and all(each["reason"] for each in first)
    api.post(f"images/{first[0]['seed']}/skip")
    assert first[0]["seed"] not in {each["seed"] for each in api.get("suggestions?count=3").json()}
    opened = api.post("images", json={"seed": None}).json()
    assert opened["seed"] not in (20, 21, first[0]["seed"])


def test_only_who_knows_the_secret_and_this_machine_s_name(desk: Desk) -> None:
    origin = desk.address.rsplit("/", 2)[0]
    for path in ("/", "/api/session", "/wrong/api/session", "/wrong/"):
        assert httpx.get(origin + path).status_code == 404
    assert httpx.get(f"{desk.address}api/session", headers={"Host": "evil.example"}).status_code == 404
    answer = httpx.get(desk.address)
    assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    for path in ("main.js", "page.css", "icon.svg"):
        assert httpx.get(desk.address + path).status_code == 200
    for path in ("../app.py", "%2e%2e/app.py", "nothing.js", "api/nothing"):
        assert httpx.get(desk.address + path).status_code == 404


def test_two_people_at_once(desk: Desk, small_generator: Path) -> None:
    command = [sys.executable, "-m", "labelmint.cli", "annotate", "--generator", str(small_generator)]
    done = subprocess.run([*command, str(desk.directory)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "open in another `labelmint annotate`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk(api: httpx.Client, desk: Desk) -> None:
    draw(api, 12)
    before = read_masks(desk.directory).labels[12]
    more = {"revision": 1, "strokes": [*STROKES, brush(1, (3, 3))]}
    with desk.full_disk():
        status, reason, detail = problem(api.put("images/12/strokes", json=more))
        assert (status, reason) == (507, "CANNOT_SAVE") and "make room" in detail
        assert problem(api.post("images", json={"seed": 13}))[:2] == (507, "CANNOT_SAVE")
        assert problem(api.put("classes", json={"classes": CLASSES["classes"][:3]}))[:2] == (507, "CANNOT_SAVE")
        assert problem(api.post("elsewhere", json={"format": "coco"}))[:2] == (507, "CANNOT_SAVE")
        assert problem(api.post("serve", json={}))[:2] == (507, "CANNOT_SAVE")
    assert (read_masks(desk.directory).labels[12] == before).all()
    assert len(api.get("images/12/strokes").json()["strokes"]) == len(STROKES)
    assert [each["seed"] for each in api.get("session").json()["images"]].count(13) == 0
    assert api.put("images/12/strokes", json=more).json()["revision"] == 2
    assert not list(desk.directory.rglob("*.part"))


def test_keypoints(small_generator: Path, tmp_path: Path, start_desk: Callable[..., Desk]) -> None:
    desk = start_desk(small_generator, tmp_path / "points", "--task", "keypoints")
    with httpx.Client(base_url=f"{desk.address}api/", timeout=60) as api:
        assert api.get("session").json()["classes"] == []
        names = {"classes": [{"name": "nose", "rgb": [1, 2, 3]}, {"name": "eye", "rgb": [4, 5, 6]}]}
        api.put("classes", json=names)
        api.post("images", json={"seed": 5})
        assert problem(api.post("preview", json={"seed": 5}))[:2] == (409, "TOO_FEW")
        points = [{"name": "nose", "x": 3.5, "y": 4, "visible": 2}, {"name": "eye", "x": 9, "y": 2, "visible": 1}]
        assert api.put("images/5/points", json={"revision": 0, "points": points}).json()["touched"]
        assert api.get("images/5/points").json() == {"revision": 1, "points": points}
        commands = api.post("commands", json={}).json()["commands"]
        assert len(commands) == 4 and "--task keypoints" in commands[0]
        assert problem(api.post("elsewhere", json={"format": "labelme"}))[:2] == (400, "INVALID_REQUEST")
        assert api.post("elsewhere", json={"format": "coco"}).json()["files"] == [str(keypoints_path(desk.directory))]
    for form in ("csv", "coco"):
        assert read_keypoints(desk.directory, form).labels[5].tolist() == [[3.5, 4, 2], [9, 2, 1]]


def test_ctrl_c_while_the_page_starts(small_generator: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "labelmint.cli", "annotate", "--generator", str(small_generator)]
    with subprocess.Popen(
        [*command, str(tmp_path / "drawings")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "annotate at" in line)
        process.send_signal(signal.SIGINT)  # at once: the server does not answer yet
        assert process.communicate(timeout=60)[0] == "" and process.returncode == 0


def test_the_third_command_of_the_readme(tmp_path: Path) -> None:
    """`make annotate` opens the page of the demo's generator, and Ctrl-C ends it."""
    assert "```sh\nmake annotate\n```" in (ROOT / "README.md").read_text()
    command = ["make", "--silent", "annotate", f"DRAWINGS={tmp_path / 'drawings'}"]
    environment = {**os.environ, "BROWSER": "true"}  # in place of a browser, the program `true`
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: ADDRESS.search(log.read_text()) or process.poll() is not None, 120)
        found = ADDRESS.search(log.read_text())
        assert found is not None, log.read_text()
        session = httpx.get(f"{found[1]}api/session").json()
        assert session["resolution"] == 128 and session["images"] == []
        processes = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        process.wait(60)
        wait_for(lambda: not alive(processes))
        assert "Traceback" not in log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
