"""Replaces files whole: a reader finds the old content or the new one, never a part.

Rules of this file:
- The new content is written to another file beside the old one, which is renamed at the end. If writing fails, that
  file is removed, and the old one stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path to write to; at the end it takes the place of `path`. Its name begins with a dot."""
    aside = path.with_name(f".{path.name}.part")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
