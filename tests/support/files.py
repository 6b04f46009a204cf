"""Files below a directory, for comparisons, and their forgery."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a directory, by their paths."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Change the text of a file."""
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


def forge(out: Path, change: Callable[[str], str]) -> None:
    """Change what a pull tells of its samples, and its manifest with it, so that the hashes agree."""
    rewrite(out / "samples.jsonl", change)
    data = (out / "samples.jsonl").read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    (record,) = (file for file in manifest["files"] if file["path"] == "samples.jsonl")
    record.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (out / "manifest.json").write_text(json.dumps(manifest))
