"""What the tests of pulls share.

Rules of this file:
- `tiny` is pulled with a gate that half of its samples pass; `faces` and `faces_keypoints` are the demo's.
"""

from __future__ import annotations

from pathlib import Path


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by their paths."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
