"""Measures how well models train on the labels: the paper's comparison on the demo's domain, tested on exact renders.

Rules of this file:
- There are five sources of training pairs: (a) the 16 annotated images, (b) the same with strong augmentation, (c)
  labelmint with the JS gate, (d) without it, (e) exact renders, the ceiling. All but (a) have the same augmentation.
- All runs use `clients/pytorch/train_segmenter.py`: the same network, the same number of steps. (c) and (d) pull over
  gRPC while they train, from a gateway whose cache serves the later runs.
- A run's figures are written as soon as it ends, in `build/labels_train_models` to a directory named after the weights.
  So an interrupted benchmark resumes, other weights are measured anew, and `--report` only prints and plots.

Run it as `python benchmarks/labels_train_models.py`; it also writes docs/images/labels_train_models.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from demo import faces
from demo.annotate import compiled_renderer, exact_masks
from demo.committed import GENERATOR, INTERPRETER, fingerprint
from serving import gateway
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from labelmint.models.annotations import write_json
from labelmint.models.draw import drawn_images
from labelmint.models.generator import to_uint8
from labelmint.models.store import load_generator, read_notes
from labelmint_client import SampleOptions
from labelmint_client.torch import LabeledSampleDataset

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "clients" / "pytorch"))
from train_segmenter import BATCH, Segmenter, evaluate, train  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "labels_train_models.json"
EVALUATION_SEED, EVALUATION_COUNT = 4_200_000_000, 1000
RENDER_SEED = 3_000_000_000
SIZES = (1000, 10_000)
SEEDS = (0, 1, 2)
ARMS = {
    "a": "16 annotated images",
    "b": "16 annotated images, strong augmentation",
    "c": "labelmint with the JS gate",
    "d": "labelmint without the gate",
    "e": "exact renders (ceiling)",
}
Pairs = tuple[Tensor, Tensor]  # image uint8 [N,3,R,R], label uint8 [N,R,R]


@dataclass(frozen=True)
class Run:
    """One training: the source and number of different pairs, and the seed of weights, order and augmentation."""

    arm: str
    samples: int
    seed: int


def runs() -> list[Run]:
    """Return all runs. Smaller sizes come first, because the samples of larger sizes include theirs."""
    small = [Run(arm, 16, seed) for arm in "ab" for seed in SEEDS]
    return small + [Run(arm, size, seed) for size in SIZES for arm in "cde" for seed in SEEDS]


def annotated() -> Pairs:
    """Return the 16 images that the demo's interpreter was fitted on, with their masks."""
    seeds = read_notes(INTERPRETER)["seeds"]
    generator = load_generator(GENERATOR)
    images = np.stack([image for _, image in drawn_images(generator, seeds, 1.0)])  # [16,R,R,3]
    masks = np.stack(list(exact_masks(seeds).values()))  # [16,R,R]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(masks)


def rendered(first_seed: int, count: int, kept: Path) -> Pairs:
    """Return exact pairs of consecutive seeds, from the file `kept` if it exists."""
    if not kept.exists():
        render = compiled_renderer()
        faces_ = [render(seed) for seed in tqdm(range(first_seed, first_seed + count), desc=kept.stem, unit="img")]
        images = torch.cat([to_uint8(face.image).permute(0, 3, 1, 2) for face in faces_])
        aside = kept.with_suffix(".part")
        torch.save((images, torch.cat([face.label for face in faces_])), aside)
        aside.replace(kept)
    images, labels = torch.load(kept)
    return images, labels


def batches(pairs: Pairs) -> Iterator[Pairs]:
    return iter(list(zip(*(part.split(BATCH) for part in pairs), strict=True)))


def pulled(endpoint: str, gated: bool) -> Iterator[Pairs]:
    options = SampleOptions() if gated else SampleOptions(include_rejected=True)
    dataset = LabeledSampleDataset(endpoint, "faces", options=options)
    return iter(DataLoader(dataset, batch_size=BATCH, num_workers=1))


def measure() -> list[dict[str, Any]]:
    """Make all runs that were not made with these weights before, and return the figures of all."""
    folder = ROOT / "build" / "labels_train_models" / fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.json"
    kept: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    image, label = rendered(EVALUATION_SEED, EVALUATION_COUNT, folder / "evaluation.pt")
    drawn = annotated()
    done = {Run(entry["arm"], entry["samples"], entry["seed"]) for entry in kept}
    with gateway("--model-repository", str(ROOT / "model_repository"), "--cache-bytes", str(10**9)) as served:
        sources: dict[str, Callable[[], Iterator[Pairs]]] = {
            "a": lambda: batches(drawn),
            "b": lambda: batches(drawn),
            "c": lambda: pulled(served.grpc, gated=True),
            "d": lambda: pulled(served.grpc, gated=False),
            "e": lambda: batches(rendered(RENDER_SEED, max(SIZES), folder / "renders.pt")),
        }
        for run in (run for run in runs() if run not in done):
            started = time.perf_counter()
            classes = len(faces.CLASS_NAMES)
            network: Segmenter = train(
                sources[run.arm](), run.samples, classes, augmented=run.arm != "a", seed=run.seed
            )
            by_class = dict(zip(faces.CLASS_NAMES, evaluate(network, image, label), strict=True))
            mean = sum(by_class.values()) / classes
            kept.append(asdict(run) | {"miou": mean, "iou": by_class, "seconds": time.perf_counter() - started})
            write_json(file, kept)
            print(f"({run.arm}) {run.samples:>6} samples, seed {run.seed}: mIoU {mean:.3f}", flush=True)
    write_json(RESULTS, kept)
    return kept


def by_source(kept: list[dict[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """Return the mIoU of each seed by (arm, samples)."""
    found: dict[tuple[str, int], list[float]] = {}
    for entry in kept:
        found.setdefault((entry["arm"], entry["samples"]), []).append(entry["miou"])
    return found


def report(kept: list[dict[str, Any]]) -> None:
    means = {source: (np.mean(values), np.std(values)) for source, values in by_source(kept).items()}
    print(f"{'mIoU on 1,000 exact renders':<44}" + "".join(f"{size:>14,}" for size in SIZES))
    for arm, title in ARMS.items():
        cells = [means.get((arm, size)) or means.get((arm, 16)) for size in SIZES]
        print(
            f"({arm}) {title:<40}"
            + "".join("             -" if c is None else f"{c[0]:>8.3f}±{c[1]:.3f}" for c in cells)
        )
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for arm, title in ARMS.items():
        sizes = [size for size in (16, *SIZES) if (arm, size) in means]
        if not sizes:
            continue  # not measured yet
        values, spread = (np.array(part) for part in zip(*(means[arm, size] for size in sizes), strict=True))
        if sizes == [16]:
            axes.axhline(values[0], label=f"({arm}) {title}", linestyle="--", color="black" if arm == "b" else "gray")
        else:
            axes.errorbar(sizes, values, spread, label=f"({arm}) {title}", marker="o", capsize=3)
    axes.set(xlabel="different training samples", ylabel="mIoU on 1,000 exact renders", xticks=SIZES)
    axes.set_title("One network, one schedule, five sources of labels (mean of 3 seeds)")
    axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "labels_train_models.png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="only print and plot what was measured before")
    arguments = parser.parse_args()
    report(json.loads(RESULTS.read_text()) if arguments.report else measure())


if __name__ == "__main__":
    main()
