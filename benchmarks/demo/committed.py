"""Where the demo's committed weights are, and the name under which measurements of them are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
GENERATOR = WEIGHTS / "generator.safetensors"
INTERPRETER = WEIGHTS / "interpreter.safetensors"


def fingerprint() -> str:
    """Return 16 hexadecimal digits that change with the generator and with its interpreter of parts."""
    return hashlib.sha256(GENERATOR.read_bytes() + INTERPRETER.read_bytes()).hexdigest()[:16]
