"""Hostile weights, masks and annotations, read in a monitored process with limited memory.

Crafted checkpoints come from tests/support/checkpoints/hostile.py; this file has the other files that the commands
read. Each file must be refused with one message, or read if its content is harmless. Nothing may be run, and nothing
may be written outside of its directory.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import ROOT
from tests.support.checkpoints.hostile import CASES
from tests.torture.outcome import Outcome

CHILD = ROOT / "tests" / "torture" / "import_files.py"
ANNOTATIONS = ROOT / "tests" / "data" / "annotations"
ANSWERS = {"UnusableFile", "InvalidRequest", "IncompatibleWeights", "read"}
# The most that one file may cost: the readers' largest limits, with a margin.
MAX_MEGABYTES = 600
MAX_SECONDS = 60.0
MASK, IMAGE = "masks/0000000003.png", "images/0000000003.png"
Change = Callable[[Path], object]


def png(width: int, height: int, mode: int = 0, more: bytes = b"") -> bytes:
    """Return a PNG that declares a size. Its pixels are zeros, as many as fit into a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    pixels = zlib.compress(bytes(min((width + 1) * height, 1 << 24)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    content = b"k\0\0" + zlib.compress(bytes(1 << 28), 9)
    return struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))


def written(name: str, content: bytes | str) -> Change:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def linked(name: str, target: str) -> Change:
    def change(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(target)

    return change


def edited(name: str, change: Callable[[dict], object]) -> Change:  # type: ignore[type-arg]
    def apply(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return apply


def saved(mode: str, format_name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).convert(mode).save(stream, format_name)
    return stream.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\nshowpage\n%%EOF\n"
COCO, LABELME = "annotations/instances_default.json", "images/0000000003.json"

# By name: the format that a directory of annotations is read as, and the change to it.
ANNOTATED: dict[str, tuple[str, Change]] = {
    "mask of 4 gigapixels": ("masks", written(MASK, png(65535, 65535))),
    "mask of 170 megapixels": ("masks", written(MASK, png(13000, 13000))),
    "mask of no pixels": ("masks", written(MASK, png(0, 0))),
    "mask of 2^31 columns": ("masks", written(MASK, png(2**31 - 1, 1))),
    "mask with a bomb of text": ("masks", written(MASK, png(16, 16, 0, text_bomb()))),
    "mask that is PostScript": ("masks", written(MASK, EPS)),
    "mask that is a JPEG": ("masks", written(MASK, saved("L", "JPEG"))),
    "mask that is a TIFF": ("masks", written(MASK, saved("L", "TIFF"))),
    "mask that is a GIF": ("masks", written(MASK, saved("P", "GIF"))),
    "mask in colour": ("masks", written(MASK, saved("RGB", "PNG"))),
    "mask that is empty": ("masks", written(MASK, b"")),
    "mask that is a directory": ("masks", lambda d: ((d / MASK).unlink(), (d / MASK).mkdir())),
    "mask that is a device": ("masks", linked(MASK, "/dev/zero")),
    "mask that is a pipe": ("masks", lambda d: ((d / MASK).unlink(), os.mkfifo(d / MASK))),
    "mask that links out": ("masks", linked(MASK, "/etc/passwd")),
    "mask that links to itself": ("masks", linked(MASK, "0000000003.png")),
    "image of 4 gigapixels": ("masks", written(IMAGE, png(65535, 65535))),
    "image that is PostScript": ("masks", written(IMAGE, EPS)),
    "dataset of brackets": ("masks", written("dataset.json", "[" * 1_000_000)),
    "dataset of paths": ("masks", written("dataset.json", '{"truncation_psi": 1, "seeds": ["../../etc/passwd"]}')),
    "dataset of huge seeds": (
        "masks",
        written("dataset.json", '{"truncation_psi": 1, "seeds": [1' + "0" * 5000 + "]}"),
    ),
    "dataset that is not a number": ("masks", written("dataset.json", '{"truncation_psi": NaN, "seeds": [3]}')),
    "dataset that links out": ("masks", linked("dataset.json", "/etc/passwd")),
    "classes without end": ("masks", written("classes.json", '[{"name": "a", "rgb": [0,0,0]},' * 9999)),
    "classes that are bytes": ("masks", written("classes.json", b"\xff\xfe\x00")),
    "labelme of another path": ("labelme", edited(LABELME, lambda c: c.update(imagePath="../../../etc/passwd"))),
    "labelme of huge numbers": ("labelme", edited(LABELME, lambda c: c.update(imageHeight=10**400))),
    "labelme polygon far away": (
        "labelme",
        edited(LABELME, lambda c: c["shapes"][0].update(points=[[0, 0], [1e300, 0], [0, 1e300]])),
    ),
    "labelme bitmap bomb": (
        "labelme",
        edited(LABELME, lambda c: c["shapes"][0].update(shape_type="mask", points=[[0, 0], [9, 9]], mask="A" * 10**6)),
    ),
    "coco of huge images": ("coco", edited(COCO, lambda c: c["images"][0].update(width=2**60, height=2**60))),
    "coco runs beyond the image": (
        "coco",
        edited(COCO, lambda c: c["annotations"][0].update(segmentation={"size": [16, 16], "counts": "o" * 100_000})),
    ),
    "coco runs of gigabytes": (
        "coco",
        edited(COCO, lambda c: c["annotations"][0].update(segmentation={"size": [2**30, 2**30], "counts": [2**60]})),
    ),
    "coco polygon without end": (
        "coco",
        edited(COCO, lambda c: c["annotations"][0].update(segmentation=[[0, 0, 9, 9] * 200_000])),
    ),
    "coco file names that lead out": (
        "coco",
        edited(COCO, lambda c: c["images"][0].update(file_name="..\\..\\etc\\passwd")),
    ),
    "coco keypoints by the million": (
        "keypoints",
        written(
            "annotations/person_keypoints_default.json", '{"images": [], "categories": [], "annotations": [' * 1000
        ),
    ),
}


def tensors_file(header: dict, data: bytes = b"") -> bytes:  # type: ignore[type-arg]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def generator_file(**spec: object) -> bytes:
    """Return a safetensors file whose header declares a labelmint generator, with one small tensor."""
    channels = {"4": 4, "8": 4}
    declared = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "resolution": 8, "channels": channels, **spec}
    ours = {"labelmint": json.dumps({"format_version": 1, "kind": "stylegan2", "spec": declared}), "notes": "{}"}
    return tensors_file({"__metadata__": ours, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))


WEIGHTS: dict[str, bytes] = {
    "header of terabytes": struct.pack("<Q", 1 << 40) + b"{}",
    "header that is cut off": struct.pack("<Q", 100) + b"{",
    "header of brackets": struct.pack("<Q", 900_000) + b"[" * 900_000,
    "tensor of terabytes": tensors_file({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
    "tensors that overlap": tensors_file(
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        bytes(12),
    ),
    "offsets that run backwards": tensors_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(8)),
    "z of billions": generator_file(z_dim=10**10),
    "z of nothing": generator_file(z_dim=-1),
    "z that is text": generator_file(z_dim="8"),
    "channels of billions": generator_file(channels={"4": 10**10, "8": 10**10}),
    "a billion mapping layers": generator_file(mapping_layers=10**9),
    "a resolution of 2^40": generator_file(resolution=1 << 40),
    "a resolution that is no number": generator_file(resolution=float("nan")),
    "a filter without end": generator_file(resample_filter=[1.0] * 100_000),
    "no network at all": tensors_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
}


def read_watched(cases: list[tuple[str, str, Path]], directory: Path, title: str) -> Outcome:
    """Read each (name, kind, path) in the child process. Forbidden actions are findings."""
    outcome, work = Outcome(title, len(cases)), directory / "work"
    work.mkdir()
    plan = directory / "plan.json"
    plan.write_text(json.dumps([(kind, str(path)) for _, kind, path in cases]))
    done = subprocess.run(
        [sys.executable, str(CHILD), str(plan)],
        cwd=work,
        env={"PYTHONPATH": f"{ROOT / 'service'}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if len(rows) != len(cases):
        outcome.found(f"{cases[len(rows)][0]}: ended the process with {done.returncode}: {done.stderr[-300:]}")
    for (name, _, _), row in zip(cases, rows, strict=False):
        if row["outcome"] not in ANSWERS:
            outcome.found(f"{name}: {row['outcome']}: {row['message']}")
        if row["events"]:
            outcome.found(f"{name}: did {row['events']}")
        if row["megabytes"] > MAX_MEGABYTES:
            outcome.found(f"{name}: took {row['megabytes']:.0f} MB")
        if row["seconds"] > MAX_SECONDS:
            outcome.found(f"{name}: took {row['seconds']:.0f} s")
        if len(row["message"]) > 2000 or "root:" in row["message"]:
            outcome.found(f"{name}: says too much: {row['message'][:200]}")
    if left := sorted(path.name for path in work.iterdir()):
        outcome.found(f"something was written: {left}")
    refused = sum(row["outcome"] != "read" for row in rows)
    outcome.note = f"{refused} refused, at most {max((row['megabytes'] for row in rows), default=0):.0f} MB"
    return outcome


def crafted(directory: Path, checkpoints: bool) -> Outcome:
    """Read all crafted files: annotations, weights and, if requested, those of tests/support/checkpoints/hostile.py."""
    cases: list[tuple[str, str, Path]] = []
    for number, (name, (kind, change)) in enumerate(ANNOTATED.items()):
        copy = Path(shutil.copytree(ANNOTATIONS, directory / f"annotated{number}"))
        change(copy)
        cases.append((name, kind, copy))
    for number, (name, content) in enumerate(WEIGHTS.items()):
        path = directory / f"weights{number}.safetensors"
        path.write_bytes(content)
        cases += [(name, "generator", path), (f"{name}, as an interpreter", "interpreter", path)]
    for number, (name, (content, _)) in enumerate(CASES.items() if checkpoints else ()):
        path = directory / f"checkpoint{number}.pt"
        path.write_bytes(content)
        cases.append((name, "checkpoint", path))
    return read_watched(cases, directory, "crafted files")


def cut(files: dict[str, tuple[str, bytes]], directory: Path, step: int = 1024) -> Outcome:
    """Read valid files, (kind, content) by name, cut off at every `step` bytes."""
    cases = []
    for name, (kind, content) in files.items():
        for end in range(0, len(content), step):
            path = directory / f"{name}.{end}"
            path.write_bytes(content[:end])
            cases.append((f"{name} cut off at {end}", kind, path))
    return read_watched(cases, directory, "files cut off at every kilobyte")
