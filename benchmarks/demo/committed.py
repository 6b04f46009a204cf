"""The demo's committed weights: where they are, under which name measurements of them are kept, and their precision.

Rules of this file:
- The files store float32, rounded to bfloat16. Half of each number is then zero, so git compresses the files to about
  half their size. The generator and each interpreter are in git twice: as weights and in exported models.

Run it as `PYTHONPATH=benchmarks python -m demo.committed FILE...`, which rounds the weights of these files.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch

from labelmint.models.generator import Generator
from labelmint.models.store import load_generator, load_interpreter, read_notes, save_generator, save_interpreter

WEIGHTS = Path(__file__).parent / "weights"
GENERATOR = WEIGHTS / "generator.safetensors"
INTERPRETER = WEIGHTS / "interpreter.safetensors"
KEYPOINTS = WEIGHTS / "keypoints.safetensors"


def fingerprint() -> str:
    """Return 16 hexadecimal digits that change with the generator, its interpreter of parts, and the renderer."""
    renderer = sorted((Path(__file__).parent / "faces").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in (GENERATOR, INTERPRETER, *renderer))).hexdigest()[:16]


@torch.no_grad()
def round_weights(path: Path) -> None:
    """Round every float32 of a generator or an interpreter to the nearest bfloat16, and keep its notes."""
    notes = read_notes(path)
    module = load_generator(path) if path.name == GENERATOR.name else load_interpreter(path)
    for value in module.state_dict().values():
        if value.dtype == torch.float32:
            value.copy_(value.bfloat16())
    if isinstance(module, Generator):
        save_generator(path, module, notes)
    else:
        save_interpreter(path, module, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        round_weights(path)
        print(f"{path}: rounded to bfloat16")


if __name__ == "__main__":
    main()
