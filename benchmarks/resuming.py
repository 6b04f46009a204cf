"""Rounds of a benchmark, which may be interrupted at any time and then resumes where it stopped.

Rules of this file:
- A round measures every part once, so that a change of the machine's speed affects all parts. Figures are medians over
  the rounds.
- Measurements are kept in build/, part by part, with a fingerprint of the measured files. They are used only if the
  fingerprint still matches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        help=f"start no other part after them and exit with {UNFINISHED}; the same command then resumes",
    )


class Kept:
    """The rounds of a benchmark on disk: for each round the figures of its parts."""

    def __init__(self, name: str, fingerprint: str) -> None:
        """Load the rounds of `name`. Measurements with another fingerprint are dropped."""
        self._path = BUILD / name / "rounds.json"
        kept: Figures = json.loads(self._path.read_text()) if self._path.exists() else {}
        if kept.get("fingerprint") != fingerprint:
            kept = {"fingerprint": fingerprint, "rounds": []}
        self._kept = kept
        self.rounds: list[dict[str, Figures]] = kept["rounds"]

    def begin(self, parts: Iterable[str]) -> tuple[int, dict[str, Figures]]:
        """Return the round that lacks some of the parts, or a new one: its index and its figures."""
        names = set(parts)
        if not self.rounds or names <= set(self.rounds[-1]):
            self.rounds.append({})
        return len(self.rounds) - 1, self.rounds[-1]

    def keep(self, index: int, part: str, figures: Figures) -> None:
        self.rounds[index][part] = figures
        write(self._path, self._kept)

    def complete(self, parts: Iterable[str]) -> list[dict[str, Figures]]:
        """Return the rounds that have all parts."""
        names = set(parts)
        return [each for each in self.rounds if names <= set(each)]


def measured(
    name: str, fingerprint: str, parts: Mapping[str, Callable[[], Figures]], *, rounds: int, budget: float
) -> list[dict[str, Figures]]:
    """Measure the parts in turn until `rounds` rounds have all. Returns for each round the figures of each part."""
    kept = Kept(name, fingerprint)
    ends = time.monotonic() + budget
    while len(kept.complete(parts)) < rounds:
        index, done = kept.begin(parts)
        for part, measure in parts.items():
            if part in done:
                continue
            if time.monotonic() > ends:
                print(f"{name}: {index} of {rounds} rounds; run it again to resume")
                raise SystemExit(UNFINISHED)
            started = time.monotonic()
            kept.keep(index, part, measure())
            print(f"{name}: round {index + 1} of {rounds}, {part}: {time.monotonic() - started:.1f} s", flush=True)
    return kept.complete(parts)[:rounds]


def rotated(names: Sequence[str], index: int) -> tuple[str, ...]:
    """Return the order of a round: each round begins with another name."""
    first = index % len(names)
    return (*names[first:], *names[:first])


def digest_of(files: Iterable[Path], *others: object) -> str:
    """Return the SHA-256 over files, in any order, and over the other things that a measurement depends on."""
    found = hashlib.sha256(json.dumps(others).encode())
    for path in sorted(files):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def serving_code() -> list[Path]:
    """Return the files that determine what a running service does."""
    package = ROOT / "service" / "labelmint"
    rooms = (*(package / "gateway").rglob("*.py"), *(package / "triton").rglob("*.py"), *(package / "v1").glob("*.py"))
    return [*package.glob("*.py"), *rooms]


def exporting_code() -> list[Path]:
    """Return the files that determine the content of an export."""
    package = ROOT / "service" / "labelmint"
    return [*(package / "models").glob("*.py"), *(package / "export").glob("*.py")]


def write(path: Path, content: object) -> None:
    """Write JSON under a temporary name and rename it, so that an interrupted run leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)
