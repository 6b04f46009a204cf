"""`make release`, part by part: packages that can be built again, and papers on all that is installed with them.

The audit asks a service on the internet whose answer changes; what is held here is that it fails when it cannot ask.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from labelmint.gateway.rest.pages import GALLERY
from labelmint.kernel.interpreter import SHIPPED, shipped_file
from tests.conftest import ROOT, need_program

pytestmark = pytest.mark.minutes


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commit, where building leaves nothing behind for us."""
    need_program("git", "git")
    need_program("make", "make")
    target = tmp_path_factory.mktemp("release") / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(target)], check=True)
    return target


def make(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Targets and variables of the working copy's Makefile, with the tools of this environment."""
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", f"{sys.prefix}/.ready", f"TEST={sys.prefix}", *arguments]
    return subprocess.run(
        command, cwd=clone, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def packages(clone: Path) -> Path:
    done = make(clone, "packages", "DIST=first", TZ="UTC")
    assert done.returncode == 0, done.stdout + done.stderr
    return clone / "first"


def test_the_same_commit_gives_the_same_packages(clone: Path, packages: Path) -> None:
    done = make(clone, "packages", "DIST=second", TZ="Asia/Kathmandu")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (
        {path.name: path.read_bytes() for path in directory.iterdir()} for directory in (packages, clone / "second")
    )
    assert len(first) == 4 and first == second
    for wheel in packages.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            assert any(name.endswith("py.typed") for name in names)
            if wheel.name.startswith("labelmint-"):
                assert {f"labelmint/kernel/{shipped_file(level).name}" for level in SHIPPED} <= set(names)
                scripts = {path for path in GALLERY if path.endswith(".js")}
                assert {f"labelmint/gateway/rest{path}" for path in scripts} <= set(names)
    for path in packages.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            assert {name.partition("/")[0] for name in archive.getnames()} == {path.name.removesuffix(".tar.gz")}


def test_the_papers_name_everything_that_is_installed(clone: Path, packages: Path) -> None:
    """Of an environment with the client in it, which is quicker to look through than the service's."""
    installed = clone / "installed"
    (wheel,) = packages.glob("labelmint_client-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", installed], check=True)
    install = [sys.executable, "-m", "pip", "--python", installed / "bin" / "python", "install", "--quiet", wheel]
    subprocess.run(install, check=True)
    done = make(clone, "papers", "DIST=papers", f"RELEASE={installed}")
    assert done.returncode == 0, done.stdout + done.stderr
    bill = json.loads((clone / "papers" / "labelmint.cdx.json").read_text())
    pinned = dict(line.split("==") for line in (clone / "papers" / "requirements.txt").read_text().split())
    licences = (clone / "papers" / "LICENSES.md").read_text()
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "labelmint"
    assert "timestamp" not in bill["metadata"] and "serialNumber" not in bill, "these would differ each time"
    components = {component["name"]: component["version"] for component in bill["components"]}
    assert {"googleapis-common-protos", "grpcio", "numpy", "protobuf"} <= pinned.keys()
    assert components.keys() - pinned.keys() == {"labelmint-client"}
    for name, version in pinned.items():
        assert components[name] == version
        row = re.search(rf"^\| {re.escape(name)} +\| {re.escape(version)} +\| (.+?) +\|", licences, re.M)
        assert row is not None and row[1] != "UNKNOWN", name


def test_an_audit_that_cannot_ask_fails(clone: Path) -> None:
    (clone / "asked").mkdir()
    (clone / "asked" / "requirements.txt").write_text("pillow==10.3.0\n")
    nowhere = "http://127.0.0.1:9"
    done = make(clone, "audit", "DIST=asked", HTTPS_PROXY=nowhere, https_proxy=nowhere, XDG_CACHE_HOME=str(clone))
    assert done.returncode != 0 and "onnect" in done.stderr, done.stderr
