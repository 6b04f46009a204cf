"""Writes the software bill of materials of an image, CycloneDX 1.6, from its root file system.

Rules of this file:
- It needs only Python. It reads what dpkg and Python's installers recorded, and the files of the models.
- The same files give the same bill: it has no time and no serial number, and its components are sorted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]


def bill(root: Path, name: str, version: str, revision: str) -> dict[str, Any]:
    """Return the bill of the image `name`, whose root file system is at `root`."""
    components = [*_debian_packages(root), *_python_packages(root), *_models(root)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "name": name,
                "version": version,
                "properties": [{"name": "org.opencontainers.image.revision", "value": revision}],
            }
        },
        "components": sorted(components, key=lambda each: each["bom-ref"]),
    }


def _debian_packages(root: Path) -> Iterator[Component]:
    for paragraph in (root / "var/lib/dpkg/status").read_text().strip().split("\n\n"):
        package = HeaderParser().parsestr(paragraph)
        if package["Status"] == "install ok installed":
            name, version = package["Package"], package["Version"]
            url = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={package['Architecture']}"
            yield {"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url}


def _python_packages(root: Path) -> Iterator[Component]:
    for directory in ("opt/*/lib/python3*/site-packages", "usr/lib/python3/dist-packages"):
        for path in root.glob(f"{directory}/*.dist-info/METADATA"):
            package = HeaderParser().parsestr(path.read_text())
            name, version = package["Name"], package["Version"]
            url = f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version)}"
            component = {"type": "library", "name": name, "version": version, "purl": url, "bom-ref": url}
            if expression := package["License-Expression"]:
                component["licenses"] = [{"expression": expression}]
            yield component


def _models(root: Path) -> Iterator[Component]:
    for path in root.glob("model_repository/*/*/*"):
        name, version = path.parts[-3:-1]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield {
            "type": "machine-learning-model",
            "name": name,
            "version": version,
            "hashes": [{"alg": "SHA-256", "content": digest}],
            "bom-ref": f"model:{name}@{version}/{path.name}",
        }
