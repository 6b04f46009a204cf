"""Measures the time from a stroke to its prediction on the annotation page, at 128² and at 512².

Rules of this file:
- The measured program is `labelmint annotate` itself, asked over its socket as its page asks: save the strokes, predict
  this image and six others, fetch the seven labels.
- The features of the seven images are there before the first measured stroke.
- 128² is the demo. 512² has the channels of StyleGAN2's configuration F and random weights: the time does not depend
  on what they draw.

Run it as `PYTHONPATH=benchmarks python -m annotate.latency`; it writes benchmarks/results/annotate_latency.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import resuming
import torch
from demo import faces
from resuming import ROOT, Figures

from annotate.quick import GENERATOR
from labelmint.models.generator import Generator
from labelmint.models.store import save_generator
from labelmint.models.stylegan2 import StyleGAN2Spec

RESULTS = ROOT / "benchmarks" / "results" / "annotate_latency.json"
STROKES = 20
SEED, OTHERS = 4_000_000_005, [4_000_000_010 + number for number in range(6)]
BARS = {"128": 1.0, "512": 3.0}  # seconds


@contextmanager
def page(generator: Path, directory: Path) -> Iterator[str]:
    """The address of a running page."""
    command = [sys.executable, "-m", "labelmint.cli", "annotate", "--generator", str(generator), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = (re.search(r"annotate at (http://\S+)", line) for line in process.stdout)
            yield next(match[1] for match in found if match)
        finally:
            process.terminate()


def ask(address: str, method: str, path: str, body: Any = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}api/{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=600) as answer:
        content: bytes = answer.read()
        return content


def open_image(address: str, seed: int) -> None:
    classes = [{"name": n, "rgb": rgb} for n, rgb in zip(faces.CLASS_NAMES, faces.PALETTE, strict=True)]
    ask(address, "PUT", "classes", {"classes": classes})
    ask(address, "POST", "images", {"seed": seed})


def measure(generator: Path, side: int) -> Figures:
    """The seconds of each stroke. The strokes are of all classes in turn, anywhere on the image."""
    rng, strokes, seconds = np.random.default_rng(0), list[dict[str, Any]](), list[float]()
    with tempfile.TemporaryDirectory() as directory, page(generator, Path(directory) / "drawings") as address:
        open_image(address, SEED)
        for revision in range(STROKES + 2):
            points = (rng.uniform(0.1, 0.9, 2) * side + rng.uniform(-0.1, 0.1, (6, 2)) * side).round(1).tolist()
            number = revision % len(faces.CLASS_NAMES)
            strokes.append({"tool": "brush", "class": number, "radius": side / 40, "points": points})
            started = time.perf_counter()
            ask(address, "PUT", f"images/{SEED}/strokes", {"revision": revision, "strokes": strokes})
            if revision == 0:
                continue  # a prediction needs two classes
            found = json.loads(ask(address, "POST", "preview", {"seed": SEED, "others": OTHERS}))
            for seed in (SEED, *OTHERS):
                ask(address, "GET", f"preview/{found['preview']}/{seed}/label.png")
            seconds.append(time.perf_counter() - started)
    first, *others = seconds  # the first one computes the features
    print(f"{side}: first {first:.2f} s, then {np.median(others):.2f} s", flush=True)
    return {
        "first_seconds": first,
        "median_seconds": float(np.median(others)),
        "least_seconds": min(others),
        "most_seconds": max(others),
    }


def large(path: Path) -> None:
    torch.manual_seed(0)
    channels = {side: min(512, (1 << 15) // side) for side in (4, 8, 16, 32, 64, 128, 256, 512)}
    spec = StyleGAN2Spec(z_dim=512, w_dim=512, mapping_layers=8, resolution=512, channels=channels)
    save_generator(path, Generator(spec).eval(), {})


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        large(path := Path(directory) / "generator.safetensors")
        found = {"128": measure(GENERATOR, 128), "512": measure(path, 512)}
    figures: Figures = {"strokes": STROKES, "threads": torch.get_num_threads(), "bars": BARS, "by_side": found}
    resuming.write(RESULTS, figures)


if __name__ == "__main__":
    main()
