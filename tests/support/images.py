"""Images that are built here with buildah, on a base of Debian's packages, without docker and without a registry.

Rules of this file:
- The images lie in a directory of their own, so that nothing of the machine's own images is used or changed.
- mmdebstrap makes the base from Debian's packages, as the published `debian:bookworm-slim` is made: no documentation,
  and apt keeps no archives.
- `RUN apt-get` and `RUN pip` get the settings of the machine's own apt and pip: proxies, indexes, certificates.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, need_program

BASE = "docker.io/library/debian:bookworm-slim"
_HOST = "/mnt/host"  # where builds see the files that pip's settings name
# As in the published image.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*")
_NO_CACHE = """Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };
"""


def as_root(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as root, and return what it did. Raises AssertionError if it fails."""
    done = subprocess.run(
        [*ROOT_WORDS, *map(str, command)], capture_output=True, text=True, timeout=600, check=False, **options
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


# A CI runner's own user may become root without a password.
ROOT_WORDS = () if os.geteuid() == 0 else ("sudo", "--non-interactive", "--preserve-env")


@dataclass
class Store:
    """The images of one test run, and how to reach them."""

    directory: Path
    bills: Path = field(init=False)
    printed: str = ""
    _mounted: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bills = self.directory / "bills"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
        }

    def buildah(self, *words: str | Path) -> str:
        return as_root("buildah", *words, env=self.environment).stdout.strip()

    def configure(self) -> None:
        """Write the settings of buildah: where the images are, and what builds see of this machine."""
        graph, state = self.directory / "graph", self.directory / "state"
        lines = ["[storage]", f'driver = "{_driver(self.directory)}"', f'graphroot = "{graph}"', f'runroot = "{state}"']
        (self.directory / "storage.conf").write_text("\n".join(lines) + "\n")
        settings, paths = _pip_settings()
        (self.directory / "pip.conf").write_text(settings)
        volumes = [f"{self.directory / 'pip.conf'}:/etc/pip.conf:ro", *(f"{path}:{_HOST}{path}:ro" for path in paths)]
        (self.directory / "containers.conf").write_text(f"[containers]\nvolumes = {json.dumps(volumes)}\n")

    def make_base(self) -> None:
        archive = self.directory / "base" / "base.tar"
        archive.parent.mkdir()
        options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
        options += ["--dpkgopt=path-include=/usr/share/doc/*/copyright"]
        options += [f"--aptopt={line}" for line in _apt_settings()]
        as_root("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *options, "bookworm", archive)
        (archive.parent / "no-cache").write_text(_NO_CACHE)
        instructions = 'FROM scratch\nADD base.tar /\nCOPY no-cache /etc/apt/apt.conf.d/\nCMD ["bash"]\n'
        (archive.parent / "Dockerfile").write_text(instructions)
        self.buildah("bud", "--quiet", "--tag", BASE, archive.parent)
        archive.unlink()

    def build(self) -> None:
        """Build all images with the project's own script, and keep what it printed."""
        command = [sys.executable, ROOT / "k8s" / "images" / "build.py", "--bills", self.bills]
        self.printed = as_root(*command, env=self.environment, cwd=self.directory).stdout

    def inspect(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.buildah("inspect", "--type=image", image))
        return found

    def root(self, image: str) -> Path:
        """Return the root file system of the image, which stays mounted until `close`."""
        if image not in self._mounted:
            container = self.buildah("from", "--pull-never", image)
            self._mounted[image] = Path(self.buildah("mount", container))
        return self._mounted[image]

    def close(self) -> None:
        self.buildah("rm", "--all")
        as_root("rm", "-rf", self.directory)


def need_programs() -> None:
    for program in ("buildah", "mmdebstrap", "runc", "curl"):
        need_program(program, program)


def new_store(directory: Path) -> Iterator[Store]:
    """Yield a store with the base and all images."""
    need_programs()
    store = Store(directory)
    store.configure()
    try:
        store.make_base()
        store.build()
        yield store
    finally:
        store.close()


def _driver(directory: Path) -> str:
    """Return `overlay` where the kernel can mount one in this directory, or else `vfs`, which copies every layer."""
    parts = {name: directory / "probe" / name for name in ("lower", "upper", "work", "merged")}
    for path in parts.values():
        path.mkdir(parents=True)
    options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
    mount = [*ROOT_WORDS, "mount", "-t", "overlay", "overlay", "-o", options, str(parts["merged"])]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        return "vfs"
    as_root("umount", parts["merged"])
    return "overlay"


def _pip_settings() -> tuple[str, list[str]]:
    """Return the machine's pip settings as a configuration file for builds, and the files that they name.

    Variables come after files in pip's list, so they win, as they do for pip.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    paths: set[str] = set()

    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section not in ("global", "install", ":env:"):
            continue
        words = value.strip("'\"").replace("\\n", " ").split()
        for index, word in enumerate(words):
            scheme, path = word[: -len(word.removeprefix("file://"))], Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                paths.add(str(path.parent if key.endswith("index-url") else path))  # an index links to files beside it
                words[index] = f"{scheme}{_HOST}{path}"
        settings[key] = " ".join(words)
    content = "".join(f"{key} = {value}\n" for key, value in settings.items())
    return f"[global]\n{content}", sorted(paths)


def _apt_settings() -> list[str]:
    """Return how this machine's apt gets packages, where that differs from apt's defaults."""
    if shutil.which("apt-config") is None:
        return []
    dump = ["apt-config", "dump"]
    ours = subprocess.run(dump, capture_output=True, text=True, check=True).stdout.splitlines()
    with tempfile.NamedTemporaryFile("w") as nothing:
        nothing.write('Dir::Etc::main "/dev/null"; Dir::Etc::parts "/dev/null";')
        nothing.flush()
        environment = {**os.environ, "APT_CONFIG": nothing.name}
        defaults = subprocess.run(dump, env=environment, capture_output=True, text=True, check=True).stdout
    changed = set(ours) - set(defaults.splitlines())
    return [line for line in ours if line in changed and line.startswith("Acquire::") and "IndexTargets" not in line]
