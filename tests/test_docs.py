"""The commands of the README and of the documents it leads to, run one by one against a live service, and all links."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from demo.model_card import model_card
from PIL import Image

from labelmint.gateway.sampling.access import TokenLimits, parse_tokens
from tests.conftest import ROOT, Service, need_program

pytestmark = [pytest.mark.triton, pytest.mark.torch]


DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "clients/*/*.md", "benchmarks/**/*.md", "k8s/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


def blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def here(text: str, service: Service) -> str:
    """The default ports in the documents become this service's ports."""
    http = service.http.removeprefix("http://")
    return text.replace("localhost:8080", http).replace("localhost:50051", service.grpc)


def test_the_curl_commands(service: Service, http: httpx.Client, tmp_path: Path) -> None:
    need_program("curl", "curl")
    found = [*blocks("sh"), *blocks("sh", "docs/rest.md")]
    commands = [block for block in found if block.startswith("curl")]
    assert len(commands) == 6
    shown = {int(seed) for command in commands for seed in re.findall(r"/samples/(\d+)", command)}
    assert shown, "the documents show samples"
    for seed in shown:
        assert http.get(f"/v1/models/faces/samples/{seed}").status_code == 200, "a seed to show is an accepted one"
    outputs = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-ec", here(command, service)], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, command + done.stderr
        outputs.append(done.stdout)
    assert Image.open(tmp_path / "pair.png").size[0] > 600
    assert json.loads(outputs[1])["accepted"] is True
    with np.load(tmp_path / "sample.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"image", "label", "js_map", "js_score", "threshold", "seed"}
    tighter = {outcome["seed"]: outcome["accepted"] for outcome in json.loads(outputs[2])["outcomes"]}
    assert tighter == {7: True, 8: False, 9: True, 10: True}, "the README's tighter gate must show both verdicts"
    group = json.loads(outputs[5])["outcomes"]
    threshold = http.get("/v1/models/faces").json()["calibration"]["threshold"]
    assert [outcome["threshold"] for outcome in group] == [pytest.approx(threshold, rel=0.01)] * 3
    assert [outcome["style_seed"] for outcome in group] == [1, 2, 3], "the group must be an accepted one"
    assert len({outcome["group_id"] for outcome in group}) == 1


def test_the_grpc_example(service: Service, tmp_path: Path) -> None:
    (script,) = [block for block in blocks("python") if "import grpc" in block]
    done = subprocess.run(
        [sys.executable, "-c", here(script, service)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("(128, 128, 3)" in line and "resume at" in line for line in lines)


def test_the_webdataset_example(service: Service, tmp_path: Path) -> None:
    (script,) = [block for block in blocks("python", "docs/streaming.md") if "import webdataset" in block]
    script = here(script, service).replace("count=50", "count=3")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(128, 128, 3) (128, 128)"] * 6


def test_the_index_commands(tmp_path: Path) -> None:
    """Fewer seeds than the document walks. The shard that it shows has none of them."""
    (tmp_path / "model_repository").symlink_to(ROOT / "model_repository")
    whole, shard = [block for block in blocks("sh", "docs/indexing.md") if block.startswith("labelmint index")]
    (query,) = blocks("python", "docs/indexing.md")
    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (whole, whole, shard):
        done = subprocess.run(
            ["bash", "-ec", command.replace("0:1000000", "0:24")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=path,
        )
        assert done.returncode == 0, done.stderr
    assert "shard 2 of 4 has no seeds" in done.stdout
    (file,) = (tmp_path / "index").iterdir()
    named = re.findall(r"`(faces-\S+\.parquet)`", (ROOT / "docs" / "indexing.md").read_text())
    assert [re.sub(r"[0-9a-f]{12}", "D", name) for name in named] == [
        re.sub(r"[0-9a-f]{12}", "D", file.name).replace("0000000024", "0001000000")
    ]
    done = subprocess.run([sys.executable, "-c", query], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "pixels_glasses" in done.stdout, done.stderr


def test_the_tokens_line(tmp_path: Path) -> None:
    need_program("openssl", "openssl")
    (script,) = [block for block in blocks("sh", "docs/operating.md") if "openssl" in block]
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True)
    (entry,) = parse_tokens(tmp_path / "tokens", (tmp_path / "tokens").read_text()).values()
    assert entry == ("training", TokenLimits(200.0, 8))


def test_the_make_targets_exist() -> None:
    targets = {block.split()[1] for block in blocks("sh") if block.startswith("make ")}
    assert targets == {"serve", "annotate", "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_local_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


# Neither distribution is on the package index, where anyone may take its name: it is installed from a clone.
OURS = ("labelmint", "labelmint-client", "labelmint_client")
INSTALL = re.compile(r"""pip install((?: +(?:'[^'\n]+'|"[^"\n]+"|[^\s'"`\\]+))+)""")
CLONE = (".", "./clients/python")
INSTALLING = ("*.md", "*.py", "*.yaml", "*.yml", "*.Dockerfile", "*.mjs", "*.js", "*.sh", "*.html", "Makefile")


def extras(directory: str) -> set[str]:
    """What may be asked for of the distribution in a directory of the clone."""
    section = (ROOT / directory / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    return set(re.findall(r"^([a-z0-9]+) = \[", section.partition("\n[")[0], re.MULTILINE))


def requirements(text: str) -> list[str]:
    """What the `pip install` lines of a text ask for."""
    found = []
    for line in INSTALL.findall(re.sub(r'"\s*\n\s*f?"', "", text)):
        for word in line.split():
            if word in ("or", "and", "in", "into"):  # the sentence goes on
                break
            requirement = word.rstrip(",;:)").strip("'\"")
            if not requirement.startswith("-"):
                found.append(requirement)
            if word != word.rstrip(",;:)"):
                break
    return found


def wrong_installs(text: str, dockerfile: bool = False) -> list[str]:
    """The requirements of `pip install` lines that are ours and cannot be installed from a clone."""
    wrong = []
    for requirement in requirements(text):
        name, _, asked = requirement.rstrip("]").partition("[")
        if name in CLONE:
            # An image copies either directory and builds it as `.`; the command line fills in {extra}.
            known = extras(".") | extras("clients/python") if dockerfile else extras(name)
            if not set(filter(None, asked.split(","))) <= known | {"{extra}"}:
                wrong.append(requirement)
        elif re.split("[=<>~!]", name)[0] in OURS:
            wrong.append(requirement)
    return wrong


def test_what_is_ours_is_installed_from_a_clone() -> None:
    for text in ("pip install labelmint", "`pip install 'labelmint-client[pull]'`", "pip install '.[nonesuch]'"):
        assert wrong_installs(text), text
    assert wrong_installs("pip install '.[export,triton]' './clients/python[pull]'") == []
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *INSTALLING], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    asked = set()
    for name in filter(None, listed.split("\0")):
        if name not in ("CHANGELOG.md", "tests/test_docs.py") and (ROOT / name).is_file():
            text, dockerfile = (ROOT / name).read_text(), name.endswith("Dockerfile")
            assert wrong_installs(text, dockerfile) == [], name
            asked |= set() if dockerfile else set(requirements(text))
    asked = {each for each in asked if each.partition("[")[0] in CLONE and "{" not in each}
    assert len(asked) > 3
    # pip builds them and says what it would install; what they depend on is this environment's.
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--no-build-isolation"]
    for requirement in sorted(asked):
        subprocess.run([*command, requirement], cwd=ROOT, check=True, timeout=120)


def test_the_model_card_is_what_the_figures_say() -> None:
    figures = json.loads((ROOT / "benchmarks" / "demo" / "weights" / "figures.json").read_text())
    assert (ROOT / "docs" / "model-card.md").read_text() == model_card(figures)


def test_every_promise_names_tests_that_exist() -> None:
    promises = re.split(r"^## ", (ROOT / "docs" / "guarantees.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(promises) > 5
    for promise in promises:
        held_by = re.findall(r"`(tests/[^`]+)`", promise.partition("- Held by")[2])
        assert held_by, promise
        for name in held_by:
            assert "def test_" in (ROOT / name).read_text(), name
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntorture:" in makefile and "\nrelease:" in makefile
