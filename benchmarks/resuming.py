"""Rounds of a benchmark that may be interrupted at any time and goes on where it was.

Rules of this file:
- A round measures every part once, so that what happens to the machine meanwhile happens to all; figures are medians
  over the rounds.
- What was measured lies in build/, part by part, and counts only for what it was measured on: a fingerprint of the
  files lies beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
UNFINISHED = 3  # the exit code of a run whose budget was too small
Figures = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, rounds: int = 5) -> None:
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help=f"begin no other part after them and exit with {UNFINISHED}; the same command then goes on",
    )


def measured(
    name: str, fingerprint: str, parts: Mapping[str, Callable[[], Figures]], rounds: int, budget: float
) -> list[dict[str, Figures]]:
    """Measure the parts in turn until there are so many rounds of all: for each round the figures of each part."""
    path = BUILD / name / "rounds.json"
    kept: Figures = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("fingerprint") != fingerprint:
        kept = {"fingerprint": fingerprint, "rounds": []}
    done: list[dict[str, Figures]] = kept["rounds"]
    ends = time.monotonic() + budget
    for index in range(rounds):
        if index == len(done):
            done.append({})
        for part, measure in parts.items():
            if part in done[index]:
                continue
            if time.monotonic() > ends:
                print(f"{name}: {index} of {rounds} rounds; run it again to go on")
                raise SystemExit(UNFINISHED)
            started = time.monotonic()
            done[index][part] = measure()
            write(path, kept)
            print(f"{name}: round {index + 1} of {rounds}, {part}: {time.monotonic() - started:.1f} s", flush=True)
    return done[:rounds]


def digest_of(files: Iterable[Path], *others: object) -> str:
    """SHA-256 over files, whose order counts for nothing, and what else a measurement depends on."""
    found = hashlib.sha256(json.dumps(others).encode())
    for path in sorted(files):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def exporting_code() -> list[Path]:
    """The files that decide what an export is."""
    package = ROOT / "service" / "labelmint"
    return [*(package / "models").glob("*.py"), *(package / "export").glob("*.py")]


def write(path: Path, content: object) -> None:
    """JSON, aside and renamed: an interrupted run leaves the file before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)
