#!/usr/bin/env python3
"""Builds labelmint's images, writes a bill of materials for each, and prints their sizes and digests.

Rules of this file:
- It needs only Python, git, and buildah or docker. Each image has the version and the git revision as tags, and says
  both in its labels (and with buildah in its OCI annotations, which also name the base and its digest).
- The revision of a checkout with uncommitted changes ends in `-dirty`. Such images are not pushed.
- A digest is known to a registry only after a push, because the push compresses the layers. That digest belongs into
  k8s/components/images. Without a push, the printed digest is that of the image on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bill import bill

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Image:
    """One image: its Dockerfile, its name behind the common one, and what it is."""

    dockerfile: str
    suffix: str
    title: str

    @property
    def base(self) -> str:
        """The image that the last stage starts from."""
        return re.findall(r"^FROM (\S+)", (ROOT / self.dockerfile).read_text(), re.MULTILINE)[-1]


IMAGES = {
    "gateway": Image("k8s/images/gateway.Dockerfile", "/gateway", "labelmint gateway"),
    "models": Image("k8s/images/models.Dockerfile", "/models", "labelmint demo models"),
    "client": Image("k8s/images/client.Dockerfile", "/client", "labelmint client"),
    "labelmint": Image("Dockerfile", "", "labelmint with Triton, for CPUs"),
}


def run(*command: str) -> str:
    """Return what the command printed. Its messages go to the terminal. Raises SystemExit if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout}")
    return done.stdout.strip()


class Buildah:
    """Builds with buildah, as root or in a user namespace."""

    def build(self, dockerfile: str, tags: list[str], labels: dict[str, str]) -> None:
        told = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
        told += [word for key, value in labels.items() for word in ("--annotation", f"{key}={value}")]
        named = [word for tag in tags for word in ("--tag", tag)]
        # With --layers, images share the steps that they have in common, here and in the registry.
        print(run("buildah", "bud", "--layers", "--format=oci", *told, *named, f"--file={dockerfile}", "."))

    def inspect(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("buildah", "inspect", "--type=image", image))
        return found

    def sizes(self, image: str, base: str) -> tuple[int, int]:
        """Return the bytes of the image's layers, and of those that it adds to its base."""
        built, below = self.inspect(image), self.inspect(base)
        # The digests in a manifest are of compressed layers if the image came from a registry. These are not.
        layers, of_base = (each["OCIv1"]["rootfs"]["diff_ids"] for each in (built, below))
        assert layers[: len(of_base)] == of_base, f"{image} is not based on {base}"
        sizes = [layer["size"] for layer in json.loads(built["Manifest"])["layers"]]
        return sum(sizes), sum(sizes[len(of_base) :])

    @contextlib.contextmanager
    def root(self, image: str) -> Iterator[Path]:
        """Yield the image's root file system."""
        container = run("buildah", "from", "--pull-never", image)
        try:
            yield Path(run("buildah", "mount", container))
        finally:
            run("buildah", "rm", container)

    def digest(self, image: str) -> str:
        return str(self.inspect(image)["FromImageDigest"])

    def push(self, tags: list[str]) -> str:
        """Push the image under all its tags. Returns its digest in the registry."""
        with tempfile.NamedTemporaryFile("r") as file:
            for tag in tags:
                run("buildah", "push", f"--digestfile={file.name}", tag)
            return file.read().strip()


class Docker:
    """Builds with docker."""

    def build(self, dockerfile: str, tags: list[str], labels: dict[str, str]) -> None:
        told = [word for key, value in labels.items() for word in ("--label", f"{key}={value}")]
        run(
            "docker", "buildx", "build", "--load", *told, *(f"--tag={tag}" for tag in tags), f"--file={dockerfile}", "."
        )

    def sizes(self, image: str, base: str) -> tuple[int, int]:
        run("docker", "pull", "--quiet", base)
        whole, of_base = (int(run("docker", "image", "inspect", "--format={{.Size}}", each)) for each in (image, base))
        return whole, whole - of_base

    @contextlib.contextmanager
    def root(self, image: str) -> Iterator[Path]:
        container = run("docker", "create", image, "none")
        try:
            with tempfile.TemporaryDirectory() as directory:
                export = subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE)
                unpack = ["tar", "-x", "-C", directory, "--no-same-owner", "--exclude=dev/*"]
                subprocess.run(unpack, stdin=export.stdout, check=True)
                yield Path(directory)
        finally:
            run("docker", "rm", container)

    def digest(self, image: str) -> str:
        return run("docker", "image", "inspect", "--format={{.Id}}", image)

    def push(self, tags: list[str]) -> str:
        for tag in tags:
            run("docker", "push", "--quiet", tag)
        return run("docker", "image", "inspect", "--format={{index .RepoDigests 0}}", tags[0]).partition("@")[2]


def labels_of(image: Image, version: str, revision: str, source: str | None) -> dict[str, str]:
    """Return the labels of an image, under the names that the OCI defines."""
    said = {
        "title": image.title,
        "version": version,
        "revision": revision,
        "created": run("git", "log", "-1", "--format=%cI"),
        "licenses": "Apache-2.0",
    } | ({"source": source} if source else {})
    return {f"org.opencontainers.image.{key}": value for key, value in said.items()}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line. Raises SystemExit with a message for what cannot work."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="localhost/labelmint", help="registry and name, as in ghcr.io/you/labelmint")
    parser.add_argument("--with", dest="program", choices=("buildah", "docker"), default="buildah")
    parser.add_argument("--push", action="store_true", help="push the images to the registry")
    parser.add_argument("--source", help="URL of the source code, for the label")
    parser.add_argument("--bills", type=Path, default=ROOT / "dist" / "images", help="directory for the bills")
    parser.add_argument("images", nargs="*", default=list(IMAGES), help=f"of {', '.join(IMAGES)}; all of them if none")
    options = parser.parse_args(arguments)
    if unknown := set(options.images) - IMAGES.keys():
        parser.error(f"there is no image {min(unknown)}; there are {', '.join(IMAGES)}")
    if options.push and options.name.startswith("localhost/"):
        parser.error("--push needs --name with a registry, as in --name ghcr.io/you/labelmint")
    if shutil.which(options.program) is None:
        parser.error(f"{options.program} is not installed (on Debian: apt-get install {options.program})")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    revision = run("git", "rev-parse", "HEAD") + ("-dirty" if run("git", "status", "--porcelain") else "")
    if options.push and revision.endswith("-dirty"):
        raise SystemExit("the checkout has uncommitted changes; commit them before a push")
    if options.program == "buildah" and os.geteuid() != 0:  # only in a user namespace it may mount an image
        os.execvp("buildah", ["buildah", "unshare", sys.executable, *sys.argv])
    tool = Docker() if options.program == "docker" else Buildah()
    options.bills.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.images:
        image = IMAGES[name]
        tags = [f"{options.name}{image.suffix}:{tag}" for tag in (version, revision)]
        tool.build(image.dockerfile, tags, labels_of(image, version, revision, options.source))
        with tool.root(tags[0]) as root:
            content = json.dumps(bill(root, f"{options.name}{image.suffix}", version, revision), indent=2) + "\n"
        aside = options.bills / f".{name}.part"
        aside.write_text(content)
        os.replace(aside, options.bills / f"{name}.cdx.json")
        whole, added = tool.sizes(tags[0], image.base)
        digest = tool.push(tags) if options.push else tool.digest(tags[0])
        rows.append(f"{tags[0]:50} {whole / 1e6:6.0f} MB {added / 1e6:6.0f} MB without {image.base}  {digest}")
    print(f"revision {revision}, bills of materials in {options.bills}", *rows, sep="\n")


if __name__ == "__main__":
    main()
