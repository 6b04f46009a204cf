"""Measures seconds and resident memory of export, serving and fit for large generators with random weights.

Rules of this file:
- The channel table is StyleGAN2's own (config F), the ensemble has 10 classifiers and 34 classes.
- Memory is as the kernel counts it: the high-water mark of each child process, and for Triton with its backends the sum
  of proportional set sizes (a page that two processes share counts once), read while Triton works.

Run it as `python benchmarks/scale.py serve 512` or `python benchmarks/scale.py fit 512`; it prints one line of JSON.
With `--directory build/scale`, the export is kept there, and a second run measures the same export.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import random_models
from PIL import Image
from resident import resident

from labelmint.core.policy import latent_of
from labelmint.models.annotations import LabelClasses, write_masks
from labelmint.models.store import save_generator, save_interpreter
from labelmint.pipeline import serving
from labelmint.triton.client import Latents

NUM_CLASSES = 34
NUM_HEADS = 10
SAMPLES = 5


def write_generator(path: Path, resolution: int) -> None:
    save_generator(path, random_models.generator(random_models.stylegan2_spec(resolution)), {"source": "random"})


def run(*arguments: str) -> tuple[float, float]:
    """Run a labelmint command in a separate process. Returns its seconds and peak resident GB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "labelmint.cli", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"labelmint {arguments[0]} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def resident_gb(process: int) -> float:
    """Return the resident GB of a process and all its descendants."""
    return sum(size for _, _, size in resident(process)) / 1e9


def tritons() -> list[int]:
    """Return the process ids of this process's tritonserver children."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if "tritonserver" in Path(f"/proc/{pid}/comm").read_text()]


async def measure(repository: Path, model: str) -> dict[str, object]:
    started = time.perf_counter()
    async with serving(repository, model) as (client, served):
        ready = time.perf_counter() - started
        (triton,) = tritons()
        peak = resident_gb(triton)
        stop = asyncio.Event()

        async def watch() -> None:
            nonlocal peak
            while not stop.is_set():
                peak = max(peak, await asyncio.to_thread(resident_gb, triton))
                await asyncio.sleep(0.1)

        watcher = asyncio.create_task(watch())
        seconds = []
        for seed in range(SAMPLES):
            latent = latent_of(seed, served.z_dim)
            begun = time.perf_counter()
            latents = Latents(latent, latent, served.num_ws, 1.0)
            arrays = await client.infer(
                model, "1", latents, outputs=("image", "label", "js_map", "js_score"), timeout_seconds=300.0
            )
            seconds.append(time.perf_counter() - begun)
            assert arrays["label"].max() < NUM_CLASSES and np.isfinite(arrays["js_score"]).all()
        stop.set()
        await watcher
    return {"ready_seconds": ready, "pair_seconds_median": float(np.median(seconds)), "triton_resident_gb": peak}


def serve(resolution: int, directory: Path) -> dict[str, object]:
    generator, interpreter, repository = (directory / name for name in ("g.safetensors", "i.safetensors", "repository"))
    exported = directory / "export.json"
    if not exported.exists():
        write_generator(generator, resolution)
        built = random_models.stylegan2_interpreter(resolution, NUM_CLASSES, NUM_HEADS)
        save_interpreter(interpreter, built, {"source": "random"})
        files = ("--generator", str(generator), "--interpreter", str(interpreter))
        seconds, memory = run("export", *files, "--model-repository", str(repository), "large")
        figures = {"resolution": resolution, "export_seconds": seconds, "export_resident_gb": memory}
        exported.write_text(json.dumps(figures))
    return json.loads(exported.read_text()) | asyncio.run(measure(repository, "large"))


def fit(resolution: int, directory: Path) -> dict[str, object]:
    generator, annotations = directory / "g.safetensors", directory / "annotations"
    write_generator(generator, resolution)
    run("synth", "--generator", str(generator), str(annotations))
    seeds = json.loads((annotations / "dataset.json").read_text())["seeds"]
    rng = np.random.RandomState(0)
    masks = {}
    for seed in seeds:  # blocks of classes
        coarse = Image.fromarray(rng.randint(0, NUM_CLASSES, (16, 16)).astype(np.uint8))
        masks[seed] = np.asarray(coarse.resize((resolution, resolution), Image.Resampling.NEAREST))
    spec = random_models.interpreter_spec(resolution, {}, NUM_HEADS, num_classes=NUM_CLASSES)
    write_masks(annotations, LabelClasses(spec.class_names, spec.palette), masks)
    out = directory / "i.safetensors"
    seconds, memory = run("fit", "--generator", str(generator), "--annotations", str(annotations), str(out))
    return {"resolution": resolution, "images": len(seeds), "fit_seconds": seconds, "fit_resident_gb": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("serve", "fit"))
    parser.add_argument("resolution", type=int)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        figures = (serve if arguments.what == "serve" else fit)(arguments.resolution, directory)
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}))


if __name__ == "__main__":
    main()
