"""Measures the quick interpreter on the demo: its labels, and what its uncertainty finds.

Rules of this file:
- The strokes are short lines inside the true parts, at most a tenth of the pixels. The labels are compared with the
  renderer's exact masks of unseen seeds.
- It is compared with four linear heads on random halves of the features, whose uncertainty is the JS divergence.

Run it as `PYTHONPATH=benchmarks python -m annotate.quick`; it writes benchmarks/results/annotate_quick.json.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from demo import faces, metrics
from demo.annotate import exact_masks
from PIL import Image, ImageDraw
from torch import Tensor

from labelmint.models import quick
from labelmint.models.annotations import UNDRAWN, AnnotatedDataset, write_json
from labelmint.models.draw import draw
from labelmint.models.interpreter import sample_features
from labelmint.models.quick import Basis, Sums, preview, quick_interpreter, quick_spec
from labelmint.models.store import load_generator

GENERATOR = Path("benchmarks/demo/weights/generator.safetensors")
OUT = Path("benchmarks/results/annotate_quick.json")
SIDE, LAYOUT = faces.RESOLUTION, "paper"
DRAWN = [4_000_000_000 + number for number in range(4)]
UNSEEN = [4_200_000_000 + number for number in range(8)]
COUNTS = (1, 2, 4)
SHARE = 0.1  # of the pixels, drawn
HEADS = 4


def strokes(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a sparse mask: for each class, lines of 3 pixels' width inside it, until it has its part of SHARE."""
    sparse, present = np.full_like(mask, UNDRAWN), np.unique(mask)
    for number in present:
        inside = mask == number
        want = min(SHARE * mask.size / len(present), 0.6 * inside.sum())
        for _ in range(100):
            y, x = rng.choice(np.argwhere(inside))
            angle, length = rng.uniform(0, math.tau), rng.uniform(4, 24)
            line = Image.new("1", (SIDE, SIDE))
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            ImageDraw.Draw(line).line([(x, y), end], fill=1, width=3)
            sparse[np.asarray(line) & inside] = number
            if (sparse == number).sum() >= want:
                break
    return sparse


def pixels(features: dict[int, Tensor], mask: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the features [P,D] and class ids [P] of the drawn pixels."""
    rows, columns = (torch.from_numpy(index) for index in np.nonzero(mask != UNDRAWN))
    sampled = sample_features({r: x[0] for r, x in features.items()}, rows, columns, resolution=SIDE)
    return sampled, torch.from_numpy(mask[mask != UNDRAWN].astype(np.int64))


def found_by(uncertainty: Tensor, wrong: Tensor) -> float:
    """Return the area under the ROC curve of finding wrong pixels by their uncertainty."""
    rank = uncertainty.argsort().argsort().double() + 1
    ours, others = wrong.sum().double(), (~wrong).sum().double()
    return float((rank[wrong].sum() - ours * (ours + 1) / 2) / (ours * others))


def judged(labels: Tensor, uncertainty: Tensor, exact: Tensor) -> dict[str, float]:
    by_class = metrics.iou(metrics.confusion(labels, exact))
    present = [by_class[faces.CLASS_NAMES[k]] for k in exact.unique().tolist()]
    wrong = (labels != exact).flatten()
    return {"miou": float(np.mean(present)), "auroc_of_wrong_pixels": found_by(uncertainty.flatten(), wrong)}


def subspaces(features: Tensor, targets: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vote and the JS divergence [P] of HEADS discriminants, each on a random half of the raw channels."""
    mean, scale, rng = features.mean(dim=0), features.std(dim=0).clamp(min=1e-4), torch.Generator().manual_seed(0)
    known, others = (features - mean) / scale, (unseen - mean) / scale
    probabilities = []
    for _ in range(HEADS):
        half = torch.randperm(known.shape[1], generator=rng)[: known.shape[1] // 2]
        weight, bias = quick._discriminants(Sums.of(known[:, half], targets, len(faces.CLASS_NAMES)))
        probabilities.append((others[:, half] @ weight.t() + bias).softmax(dim=1))
    each = torch.stack(probabilities)  # [N,P,K]
    entropy = -(each * each.clamp(min=1e-30).log()).sum(dim=2).mean(dim=0)
    mixed = each.mean(dim=0)
    votes = torch.nn.functional.one_hot(each.argmax(dim=2), mixed.shape[1]).sum(dim=0)
    return votes.argmax(dim=1), -(mixed * mixed.clamp(min=1e-30).log()).sum(dim=1) - entropy


@torch.no_grad()
def main() -> None:
    generator, rng = load_generator(GENERATOR), np.random.default_rng(0)
    masks = exact_masks([*DRAWN, *UNSEEN])
    maps = {seed: draw(generator, seed, 1.0, layout=LAYOUT)[1] for seed in masks}
    exact = torch.stack([torch.from_numpy(masks[seed].astype(np.int64)) for seed in UNSEEN])  # [I,R,R]
    sparse = {seed: strokes(masks[seed], rng) for seed in DRAWN}
    drawn = {seed: pixels(maps[seed], sparse[seed]) for seed in DRAWN}
    grid = np.zeros((SIDE, SIDE), np.uint8)
    unseen = torch.cat([pixels(maps[seed], grid)[0] for seed in UNSEEN])  # [I*R*R,D]
    basis = Basis.of(torch.cat([features[::8] for features, _ in drawn.values()]))
    dataset = AnnotatedDataset("segmentation", 1.0, faces.CLASS_NAMES, faces.PALETTE, {}, {})
    spec = quick_spec(generator, dataset, LAYOUT)
    sums = {seed: Sums.of(basis.project(x), y, len(faces.CLASS_NAMES)) for seed, (x, y) in drawn.items()}
    figures = {}
    for count in COUNTS:
        seeds = DRAWN[:count]
        interpreter = quick_interpreter(spec, basis, Sums.together(sums[seed] for seed in seeds))
        label, entropy = map(torch.stack, zip(*(preview(interpreter, maps[seed]) for seed in UNSEEN), strict=True))
        features, targets = map(torch.cat, zip(*(drawn[seed] for seed in seeds), strict=True))
        vote, js = subspaces(features, targets, unseen)
        figures[str(count)] = {
            "quick": judged(label.long(), entropy, exact),
            "random_subspaces": judged(vote.view_as(exact), js, exact),
        }
        print(count, figures[str(count)], flush=True)
    share = float(np.mean([(mask != UNDRAWN).mean() for mask in sparse.values()]))
    write_json(OUT, {"share_drawn": share, "unseen_images": len(UNSEEN), "by_images": figures})


if __name__ == "__main__":
    main()
